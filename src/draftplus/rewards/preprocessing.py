"""The image preprocessing of a checkpoint as differentiable tensor operations.

The reference processors work on uint8 pictures through PIL, where no gradient passes. Without resizing, the results are
equal up to rounding; with resizing, up to PIL's rounding of the resized picture to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftplus.distributed import constant
from draftplus.errors import UserError
from draftplus.rewards.checkpoints import PROCESSOR, lacks, read_json, to_fetch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILES = ("preprocessor_config.json", "processor_config.json")  # the second as transformers 5 saves it
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint does to an image before its network. None: this step is left out.

    resize: the shorter side's length, or (height, width). crop: (height, width) around the centre, zeros where the
    image is smaller. scale: factor on pixels in [0, 1]. mean, std: per channel, after the scaling. longest: the longer
    side's length, in place of resize and crop; what is missing to a square is black. torchvision: where the crop's
    remainder is odd, its centre is that of torchvision, up to a pixel from transformers'.
    """

    resize: int | tuple[int, int] | None
    filter: str
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    longest: int | None = None
    torchvision: bool = False


def has_preprocessing(directory: str | Path) -> bool:
    """Whether a local directory has the settings of image preprocessing."""
    return any((Path(directory).expanduser() / name).exists() for name in _FILES)


def read_preprocessing(path: str, revision: str | None = None) -> Preprocessing:
    """The preprocessing of a checkpoint's preprocessor_config.json; what it leaves out is as for CLIP.

    UserError if there is no such file, or it asks for something that is not supported.
    """
    config = read_json(path, _FILES[0], revision)
    if config is None:
        config = (read_json(path, _FILES[1], revision) or {}).get("image_processor")
    if config is None:
        raise UserError(
            f"{lacks(path, _FILES[0])}: set args.processor to a checkpoint that has it."
            + to_fetch(path, "args.processor", PROCESSOR)
        )
    resample = config.get("resample", 3)
    if resample not in _FILTERS:
        raise UserError(
            f"'{path}' resizes with PIL filter {resample}; only 2 (bilinear) and 3 (bicubic) are supported."
        )
    crop = _size(config.get("crop_size", 224), path)
    normalize = config.get("do_normalize", True)
    return Preprocessing(
        resize=_size(config.get("size", {"shortest_edge": 224}), path) if config.get("do_resize", True) else None,
        filter=_FILTERS[resample],
        crop=((crop, crop) if isinstance(crop, int) else crop) if config.get("do_center_crop", True) else None,
        scale=255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0,
        mean=tuple(config.get("image_mean", CLIP_MEAN)) if normalize else None,
        std=tuple(config.get("image_std", CLIP_STD)) if normalize else None,
    )


def _size(value: int | Mapping[str, Any], path: str) -> int | tuple[int, int]:
    if isinstance(value, int):
        return value
    given = {key: length for key, length in value.items() if length is not None}
    if given.keys() == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if given.keys() == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    raise UserError(
        f"the preprocessing of '{path}' has size {dict(value)}; only shortest_edge, or height and width, are supported."
    )


def preprocess(images: Tensor, spec: Preprocessing) -> Tensor:
    """images: (b, 3, H, W) in [0, 1]. Returns (b, 3, h, w) as the network takes it, in at least float32."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    images = _cropped(images, spec) if spec.longest is None else _padded(images, spec.longest, spec.filter)
    if spec.scale != 1:
        images = images * spec.scale
    if spec.mean is not None and spec.std is not None:
        mean, std = (constant(tuple(v), images.dtype, images.device)[:, None, None] for v in (spec.mean, spec.std))
        images = (images - mean) / std
    return images


def _cropped(images: Tensor, spec: Preprocessing) -> Tensor:
    height, width = images.shape[-2:]
    if isinstance(spec.resize, int):
        short = min(height, width)
        target = (int(spec.resize * height / short), int(spec.resize * width / short))
    else:
        target = spec.resize or (height, width)
    # PIL cuts overshoots off, so must we
    images = _resized(images, target, spec.filter).clamp(0, 1) if target != (height, width) else images
    if spec.crop is not None and spec.crop != target:
        top, left = (
            round((side - kept) / 2) if spec.torchvision else (side - kept) // 2
            for side, kept in zip(target, spec.crop, strict=True)
        )
        bottom, right = target[0] - spec.crop[0] - top, target[1] - spec.crop[1] - left
        images = F.pad(images, (-left, -right, -top, -bottom))  # negative padding crops
    return images


def _padded(images: Tensor, longest: int, filter: str) -> Tensor:
    """As HPSv2 does it, on float tensors: overshoots stay."""
    height, width = images.shape[-2:]
    scale = longest / max(height, width)
    target = (round(height * scale), round(width * scale))
    if target != (height, width):
        images = _resized(images, target, filter)
    down, across = longest - target[0], longest - target[1]
    return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def _resized(images: Tensor, target: tuple[int, int], filter: str) -> Tensor:
    # antialias also chooses PIL's cubic kernel (a = -0.5) when enlarging
    return F.interpolate(images, target, mode=filter, antialias=True, align_corners=False)
