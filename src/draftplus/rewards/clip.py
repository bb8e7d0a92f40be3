"""Rewards by a CLIP model: emoji_clip, PickScore, CLIPScore, CLIP-H and one's own are one implementation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.rewards.captions import open_tokenizer, tell_of_cut
from draftplus.rewards.checkpoints import PROCESSOR, has_file, lacks, load_frozen, locate, to_fetch
from draftplus.rewards.dropout import Dropout, check_rate
from draftplus.rewards.preprocessing import Preprocessing, has_preprocessing, preprocess, read_preprocessing
from draftplus.types import Reward

EMOJI_CLIP = Path(__file__).parents[1] / "assets" / "emoji_clip"
PICKSCORE = "yuvalkirstain/PickScore_v1"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE_PROCESSOR = CLIP_H  # of the network that it was tuned from
CLIP_SCORE = "openai/clip-vit-base-patch32"
CACHED_PROMPTS = 4096  # 16 MiB of ViT-H features

Kind = Literal["logit", "cosine", "cosine100"]


class ClipReward:
    """Scores images by their cosine with the prompt in a frozen CLIP's space.

    kind "logit": exp(logit_scale)·cos, about 20-23 for PickScore (Kirstain et al. 2023). kind "cosine": cos, as HPSv2
    (Wu et al. 2023). kind "cosine100": 100·max(cos, 0), CLIPScore (Hessel et al. 2021, who scale by 2.5); no gradient
    where the cosine is negative.

    dropout: the rate in the image tower; it is active only when a gradient is taken, so measured scores have no noise.
    negative: a contrasting text, in which "{prompt}" stands for the prompt; its score is subtracted, as by SRPO (Shen
    et al. 2025, arXiv 2509.06942): what an image gains for any text then cancels.
    """

    differentiable = True

    def __init__(
        self, model: Any, tokenizer: Any, preprocessing: Preprocessing, kind: Kind = "logit", dropout: float = 0.0,
        negative: str | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.kind = kind
        self.negative = negative
        self.dropout = Dropout(model.vision_model.encoder.layers, dropout) if dropout else None
        self._text_features = lru_cache(CACHED_PROMPTS)(self._encode)
        self._told = False

    @property
    def divisible(self) -> list[nn.Module]:
        """The image tower; prompts that are known are not encoded again, and processes know different ones."""
        return [self.model.vision_model]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,) in float32, or wider if the weights are."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        features = self.image_features(images)
        scores = self._scores(features, prompts)
        if self.negative is None:
            return scores
        return scores - self._scores(features, [self.negative.replace("{prompt}", prompt) for prompt in prompts])

    def _scores(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        text = torch.stack([self._text_features(one) for one in texts])  # (b, d)
        cosine = (features * text).sum(dim=-1)  # (b,)
        if self.kind == "cosine":
            return cosine
        if self.kind == "cosine100":
            return 100 * cosine.clamp(min=0)
        return self.model.logit_scale.to(cosine.dtype).exp() * cosine

    def logits(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Each of (b, 3, H, W) images in [0, 1] with each of n captions, exp(logit_scale)·cos: (b, n)."""
        text = torch.stack([self._text_features(caption) for caption in captions])  # (n, d)
        cosine = self.image_features(images) @ text.T
        return self.model.logit_scale.to(cosine.dtype).exp() * cosine

    def image_features(self, images: Tensor) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]. Returns (b, d) of length 1."""
        pixels = preprocess(images, self.preprocessing).to(self.model.dtype)  # (b, 3, h, w)
        noisy = self.dropout is not None and images.requires_grad and torch.is_grad_enabled()
        with self.dropout.active(len(images)) if self.dropout and noisy else nullcontext():
            return _normalized(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        # one prompt at a time: its features must not depend, not even in the last bit, on what shared its batch,
        # or a resumed run with an empty cache would depart from the uninterrupted one
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        if not self._told and tokens["input_ids"].shape[1] == length:
            self._tell(prompt, length)
        # without a mask, all ones here, of which transformers would ask the device whether they are
        ids = sent(tokens["input_ids"], self.model.device)
        return _normalized(self.model.get_text_features(input_ids=ids).pooler_output)[0]  # (d,)

    def _tell(self, prompt: str, length: int) -> None:
        whole = len(self.tokenizer(prompt)["input_ids"])
        if whole > length:
            self._told = True
            tell_of_cut(prompt, whole, "a reward's text encoder", length)


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def load_tokenizer(source: str, revision: str | None) -> Any:
    """The tokenizer of a checkpoint. UserError where it has none, or one that would run code."""
    if not any(has_file(source, name, revision) for name in ("tokenizer.json", "vocab.json")):
        # transformers would make an empty tokenizer, for which all prompts are the same
        raise UserError(
            f"{lacks(source, 'tokenizer.json')}: set args.processor to a checkpoint that has it."
            + to_fetch(source, "args.processor", PROCESSOR)
        )
    return open_tokenizer(source, revision)


def load_clip_reward(
    path: str | Path,
    processor: str | Path | None = None,
    kind: Kind = "logit",
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> ClipReward:
    """The reward of a transformers `CLIPModel` checkpoint.

    path: directory or hub id, at `revision`. processor: the directory or hub id of tokenizer and preprocessing; None:
    path. dtype: of the weights, float32 unless given, whatever they are stored in. dropout: in [0, 1). negative: a
    contrasting text. UserError if files are missing or broken, or the weights are a pickle that needs code.
    """
    from transformers import CLIPModel

    weights, source = locate(path), locate(processor or path)
    source_revision = None if processor else revision
    preprocessing = read_preprocessing(source, source_revision)
    tokenizer = load_tokenizer(source, source_revision)
    model = load_frozen(CLIPModel, weights, "clip", revision, device, dtype)
    size = model.config.vision_config.image_size
    given = preprocessing.crop or preprocessing.resize
    if given not in (None, size, (size, size)):
        verb = "crops" if preprocessing.crop else "resizes"
        raise UserError(
            f"'{source}' {verb} images to {given}, but the network in '{weights}' takes {(size, size)}; "
            "set args.processor to the matching checkpoint."
        )
    return ClipReward(model, tokenizer, preprocessing, kind, dropout, negative)


def load_emoji_clip(
    path: str | Path = EMOJI_CLIP,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """The embedded reward for emoji, exp(logit_scale)·cos. For the rest see `load_clip_reward`."""
    check_rate("emoji_clip", dropout)
    return load_clip_reward(path, processor, "logit", revision, device, dtype, dropout, negative)


def load_pickscore(
    path: str | Path = PICKSCORE,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """PickScore v1 (Kirstain et al. 2023), exp(logit_scale)·cos, about 20-23.

    The published weights come without tokenizer and preprocessing: those of the network that they were tuned from
    are used, unless the directory in `path` has its own or processor names others. For the rest see
    `load_clip_reward`.
    """
    check_rate("pickscore", dropout)
    if processor is None and not has_preprocessing(path):
        processor = PICKSCORE_PROCESSOR
    return load_clip_reward(path, processor, "logit", revision, device, dtype, dropout, negative)


def load_clip_score(
    path: str | Path = CLIP_SCORE,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """CLIPScore, 100·max(cos, 0) of a CLIPModel, by default ViT-B/32. For the rest see `load_clip_reward`."""
    check_rate("clip_score", dropout)
    return load_clip_reward(path, processor, "cosine100", revision, device, dtype, dropout, negative)


def load_clip_h(
    path: str | Path = CLIP_H,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """CLIPScore of LAION's ViT-H/14, 100·max(cos, 0). For the rest see `load_clip_reward`."""
    check_rate("clip_h", dropout)
    return load_clip_reward(path, processor, "cosine100", revision, device, dtype, dropout, negative)


def load_clip(
    path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """Any `CLIPModel`, such as one that `draftplus reward train` made: exp(logit_scale)·cos. path: must be given.

    For the rest see `load_clip_reward`.
    """
    if path is None:
        raise UserError(
            "reward 'clip' has no weights of its own: set reward.clip.path to the directory or hub id of a CLIPModel, "
            "such as the result of draftplus reward train."
        )
    check_rate("clip", dropout)
    return load_clip_reward(path, processor, "logit", revision, device, dtype, dropout, negative)
