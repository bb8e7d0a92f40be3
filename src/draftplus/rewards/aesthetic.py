"""LAION's aesthetic predictor v2: how much people like an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from draftplus.errors import UserError
from draftplus.rewards.checkpoints import fit, load_weights_file
from draftplus.rewards.clip import load_clip_reward
from draftplus.rewards.dropout import check_rate
from draftplus.types import Reward

AESTHETIC = "camenduru/improved-aesthetic-predictor"  # a copy of what its author has on GitHub
FILE = "sac+logos+ava1-l14-linearMSE.pth"
CLIP_L = "openai/clip-vit-large-patch14"
WIDTH = 768  # of the features


class Head(nn.Module):
    """Linear layers without activations between them; there are three dropouts, which training alone used."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [WIDTH, 1024, 128, 64, 16, 1]
        self.layers = nn.Sequential()
        for index, (inward, outward) in enumerate(pairwise(sizes)):
            self.layers.append(nn.Linear(inward, outward))
            if index < 3:
                self.layers.append(nn.Identity())  # so that names are those of the published file

    def forward(self, features: Tensor) -> Tensor:
        """(b, 768) of length 1 to (b,)."""
        return self.layers(features).squeeze(-1)


@dataclass
class Aesthetic:
    """features: images (b, 3, H, W) to (b, 768) of length 1. divisible: what computes them."""

    features: Callable[[Tensor], Tensor]
    head: Head
    divisible: Sequence[nn.Module] = ()
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; the prompts do not matter. Returns (b,) in float32 or wider."""
        features = self.features(images)
        scores: Tensor = self.head(features.to(next(self.head.parameters()).dtype)).to(features.dtype)
        return scores


def load_aesthetic(
    path: str | Path = AESTHETIC,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    clip: str = CLIP_L,
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
) -> Reward:
    """LAION's aesthetic predictor v2 (Schuhmann 2022), about 1 to 10 and mostly 4 to 7; prompts do not matter.

    path: the head: a hub id (at `revision`) or a directory that has the published file, or the file itself. clip: the
    directory or hub id of CLIP ViT-L/14. processor: of its preprocessing, None: clip. dropout: in [0, 1), in the image
    tower.
    """
    check_rate("aesthetic", dropout)
    tensors = load_weights_file(path, FILE, revision, "aesthetic")
    head = fit(Head, tensors, f"reward.aesthetic.path '{path}'", dtype).to(device)
    network = load_clip_reward(clip, processor, device=device, dtype=dtype, dropout=dropout)
    width = network.model.config.projection_dim
    if width != WIDTH:
        raise UserError(
            f"reward 'aesthetic': the features of '{clip}' have length {width}, but its head takes {WIDTH}; set "
            f"args.clip to {CLIP_L} or a copy of it."
        )
    network.preprocessing = replace(
        network.preprocessing, torchvision=True
    )  # as OpenAI's package, which it was made with
    del network.model.text_model, network.model.text_projection  # a quarter of the network, of no use here
    return Aesthetic(network.image_features, head, network.divisible)
