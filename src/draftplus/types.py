"""The vocabulary that every layer shares: conditioning, and the shapes of a model and a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say of a batch of prompts; rows are prompts.

    hidden: (b, n, d) token embeddings for cross-attention. extras: further tensors of b rows that one family of
    models needs (SDXL's pooled embedding and size conditioning, say), by the denoiser's keyword.
    """

    hidden: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The conditioning of some of the prompts."""
        return replace(self, hidden=self.hidden[index], extras={k: v[index] for k, v in self.extras.items()})

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order."""
        return Conditioning(
            torch.cat([part.hidden for part in parts]),
            {key: torch.cat([part.extras[key] for part in parts]) for key in parts[0].extras},
        )


@runtime_checkable
class Reward(Protocol):
    """Scores images against prompts; higher is better. Any callable with this signature and flag will do.

    Where an image's score depends on the other images given with it, a further attribute `compares_images` is True, of
    the reward and of what makes it: so it is known before weights load that micro-batches shape the run.
    """

    @property
    def differentiable(self) -> bool:
        """Whether gradient flows from the scores to the images."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) float32 in [0, 1]; prompts: b strings. Returns (b,) scores."""
        ...


class Model(Protocol):
    """A text-to-image diffusion model as the sampler, the objectives and training see it."""

    device: torch.device
    scheduler_config: Mapping[str, Any]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of b prompts, without gradient; repeated prompts come from a bounded cache."""
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents; None: the size that the model was trained at."""
        ...

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's raw prediction. latents: (b, c, h, w), timestep: () or (b,). Returns (b, c, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W) float32 (float64 stays float64), clamped to [0, 1], with gradient where enabled."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `predict` is the frozen model: adapters off, or the frozen copy of a fully tuned denoiser."""
        ...

    def folded(self) -> AbstractContextManager[None]:
        """Inside, adapters are folded into float32 weights for faster inference; bit-identical afterwards."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training updates, by a stable name."""
        ...

    def save_adapter(self, directory: Path) -> None:
        """Writes the trained weights in the form that stock diffusers loads."""
        ...

    def load_adapter(self, directory: Path) -> None:
        """Reads what `save_adapter` wrote."""
        ...

    def set_lora_scale(self, scale: float) -> None:
        """Scales the adapters' effect: 0 is the base model, 1 the tuned one."""
        ...


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch: the weighted sum that is optimised, and each reward by itself, all (b,)."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Scorer(Protocol):
    """Several weighted rewards as one; what the objectives call."""

    @property
    def differentiable(self) -> bool:
        """Whether all of them carry gradient."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """images: (b, 3, H, W) float32 in [0, 1]; prompts: b strings."""
        ...
