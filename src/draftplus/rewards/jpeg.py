"""How well an image compresses as JPEG, as a differentiable reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus.distributed import constant
from draftplus.errors import UserError
from draftplus.types import Reward


@dataclass
class JpegReward:
    """±(the root mean square error of JPEG compression), in grey levels of 255.

    An image's file size has no gradient, so, as DRaFT does (Clark et al. 2023), the distance between the image and its
    compressed version stands for it, through the differentiable JPEG of Reich et al. 2024: what compression removes is
    what makes files large. At quality 10 a uniform colour is at 1-8 (rounding of its mean), a photograph of 512 pixels
    at about 10 and one of 64 pixels at about 20, white noise at 70; the bound is 255. Low qualities work better: ranks
    agree with those of file sizes on synthetic images (0.90-0.96 at quality 10, 0.85-0.93 at 95), and following the
    gradient makes files smaller the lower the quality is. Any image size.
    """

    sign: float
    quality: float
    codec: Callable[[Tensor, Tensor], Tensor]
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; the prompts do not matter. Returns (b,) in float32 or wider."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        quality = constant((self.quality,), images.dtype, images.device)
        error = (self.codec(images, quality) - images).flatten(1)  # (b, 3·H·W)
        # vector_norm, unlike a square root, has gradient 0 and not NaN where an image is reproduced exactly
        return self.sign * 255 * torch.linalg.vector_norm(error, dim=1) / error.shape[1] ** 0.5


def load_jpeg_compressibility(*, quality: float = 10.0) -> Reward:
    """Higher for images that JPEG compresses well: -RMSE in [-255, 0]. quality: JPEG's, 1 to 100."""
    return _load("jpeg_compressibility", -1.0, quality)


def load_jpeg_incompressibility(*, quality: float = 10.0) -> Reward:
    """Higher for images that JPEG compresses badly: RMSE in [0, 255]. quality: JPEG's, 1 to 100."""
    return _load("jpeg_incompressibility", 1.0, quality)


def _load(name: str, sign: float, quality: float) -> Reward:
    if not 1 <= quality <= 100:
        raise UserError(f"reward '{name}': args.quality is {quality!r}; it must be a number from 1 to 100.")
    try:
        from kornia.enhance import jpeg_codec_differentiable
    except ImportError as error:
        raise UserError(f"reward '{name}' needs kornia; run: pip install 'draftplus[jpeg]'") from error
    return JpegReward(sign, float(quality), jpeg_codec_differentiable)
