"""How much an image differs from the others of its batch: the second remedy that DRaFT's authors tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.rewards.clip import EMOJI_CLIP, load_clip_reward
from draftplus.types import Reward


@dataclass
class Dissimilarity:
    """The mean of 1 - cos to the other images that are scored with it, in [0, 2]; differentiable in all of them.

    features: images (b, 3, H, W) to (b, d) of length 1. same_prompt: compare with images of the same prompt only.
    divisible: what computes the features. Unlike other rewards it is a property of a batch: in training, of the
    micro-batch on one process.
    """

    features: Callable[[Tensor], Tensor]
    same_prompt: bool = False
    divisible: Sequence[nn.Module] = ()
    differentiable: bool = True
    compares_images: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,). UserError for an image without another."""
        alike = [[not self.same_prompt or one == other for other in prompts] for one in prompts]
        others = torch.tensor(alike).fill_diagonal_(False)  # (b, b), on the CPU as long as its numbers are read
        counts = others.sum(1)
        if counts.min() == 0:
            raise UserError(_alone(len(images), prompts[int(counts.argmin())], self.same_prompt))
        others, counts = sent(others, images.device), sent(counts, images.device)
        features = self.features(images)
        distances = 1 - features @ features.T  # (b, b)
        return (distances * others).sum(1) / counts


def _alone(images: int, prompt: str, same_prompt: bool) -> str:
    if images == 1 or not same_prompt:
        return (
            "reward 'dissimilarity' compares the images of a micro-batch, but this one has a single image; set "
            "train.micro_batch_size to 2 or more, so that no single image is left over in training or evaluation"
        )
    return (
        f"reward 'dissimilarity' with same_prompt found only one image of '{prompt}' in a micro-batch of {images}; set "
        "data.images_per_prompt to 2 or more, and train.micro_batch_size to a multiple of it"
    )


def load_dissimilarity(
    path: str | Path = EMOJI_CLIP,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    same_prompt: bool = False,
    processor: str | None = None,
    revision: str | None = None,
) -> Reward:
    """In the image space of a CLIPModel, by default emoji_clip. For the rest see `load_clip_reward`."""
    network = load_clip_reward(path, processor, revision=revision, device=device, dtype=dtype)
    return Dissimilarity(network.image_features, same_prompt, network.divisible)


load_dissimilarity.compares_images = True  # type: ignore[attr-defined]  # here too, to be known before weights load
