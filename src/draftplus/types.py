"""The vocabulary that every layer shares: conditioning, and the shapes of a model and a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.distributed import Offload
from draftplus.progress import Advance

Raw = Callable[[Tensor, Tensor], Tensor]  # (latents (b, c, h, w), timestep ()) -> the guided raw prediction


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say of a batch of prompts; rows are prompts.

    hidden: (b, n, d) token embeddings for cross-attention. mask: (b, n), True where there is a token; None: everywhere.
    extras: further tensors of b rows that one family of models needs (SDXL's pooled embedding and size conditioning,
    say), by the denoiser's keyword.
    """

    hidden: Tensor
    mask: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.hidden, self.mask, *self.extras.values()) if tensor is not None)

    def to(self, dtype: torch.dtype) -> Conditioning:
        """All that is in floating point in this precision."""
        extras = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.extras.items()}
        return Conditioning(self.hidden.to(dtype), self.mask, extras)

    def rows(self, index: slice | Tensor) -> Conditioning:
        """The conditioning of some of the prompts."""
        mask = None if self.mask is None else self.mask[index]
        return Conditioning(self.hidden[index], mask, {k: v[index] for k, v in self.extras.items()})

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; shorter ones are padded with zeros, which the mask leaves out."""
        longest = max(part.hidden.shape[1] for part in parts)
        masked = any(part.mask is not None or part.hidden.shape[1] < longest for part in parts)
        return Conditioning(
            torch.cat([_padded(part.hidden, longest) for part in parts]),
            torch.cat([_padded(_mask(part), longest) for part in parts]) if masked else None,
            {key: torch.cat([part.extras[key] for part in parts]) for key in parts[0].extras},
        )


def _mask(part: Conditioning) -> Tensor:
    return torch.ones_like(part.hidden[..., 0], dtype=torch.bool) if part.mask is None else part.mask


def _padded(tensor: Tensor, length: int) -> Tensor:
    """(b, n, …) with zeros up to (b, length, …)."""
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)


@runtime_checkable
class Reward(Protocol):
    """Scores images against prompts; higher is better. Any callable with this signature and flag will do.

    Where an image's score depends on the other images given with it, a further attribute `compares_images` is True, of
    the reward and of what makes it: so it is known before weights load that micro-batches shape the run.

    An attribute `divisible`, where there is one, lists frozen networks that several processes may hold in parts, which
    they gather together: nobody else calls them, and this reward as often for any images and prompts.
    """

    @property
    def differentiable(self) -> bool:
        """Whether gradient flows from the scores to the images."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) float32 in [0, 1]; prompts: b strings. Returns (b,) scores."""
        ...


class TunedWeights(Protocol):
    """The weights of a denoiser that training changes, and the frozen model that they started from.

    gate: the fraction of the sampling steps, the first ones, that the frozen model draws (`objective.gate`).
    """

    gate: float

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the denoiser is the frozen model: adapters off, or the frozen copy of a fully tuned one."""
        ...

    def folded(self) -> AbstractContextManager[None]:
        """Inside, adapters are folded into float32 weights for faster inference; bit-identical afterwards."""
        ...

    def widened(self) -> AbstractContextManager[None]:
        """Inside, frozen weights in half precision are in float32; bit-identical afterwards. Backward passes of what is
        computed inside belong inside too."""
        ...

    def merge(self) -> None:
        """Adds adapters to the weights for good; the frozen model is no longer at hand."""
        ...

    def has_adapters(self) -> bool:
        """Whether the trained weights are low-rank adapters, and not a whole denoiser."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training updates, by a stable name."""
        ...

    def networks(self) -> list[torch.nn.Module]:
        """The denoiser and, if it is fully tuned, the frozen copy."""
        ...

    def blocks(self, network: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The repeated blocks of one of these, the units in which it may be sharded; an outer one before those inside
        it."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained weights, by the names that stock diffusers gives them."""
        ...

    def write(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        """Writes what `state` gave, whole, in the form that stock diffusers loads."""
        ...

    def save(self, directory: Path) -> None:
        """`write` of `state`, for one process that holds all of it."""
        ...

    def load(self, path: Path) -> None:
        """Reads what `write` wrote, or another adapter that stock diffusers loads: a file, or its directory."""
        ...

    def set_scale(self, scale: float) -> None:
        """Scales the adapters' effect: 0 is the base model, 1 the tuned one."""
        ...


class Model(Protocol):
    """A text-to-image diffusion model: what is its family's own, and the weights that are tuned."""

    device: torch.device
    offload: Offload  # of what does not denoise: its autoencoder and text encoders, and the rewards

    @property
    def noise_dtype(self) -> torch.dtype:
        """The precision in which the stock pipeline of the same parts draws a seed's noise."""
        ...

    @property
    def image_dtype(self) -> torch.dtype:
        """The precision of the images that the stock pipeline of the same parts draws."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The configuration of the model's own scheduler, as the stock pipeline reads it."""
        ...

    @property
    def tuned(self) -> TunedWeights:
        """The denoiser's trained weights."""
        ...

    @property
    def decoder(self) -> torch.nn.Module:
        """The network that `decode` calls, as often for any latents of one shape."""
        ...

    def encode(self, prompts: Sequence[str | None]) -> Conditioning:
        """Conditioning of b prompts, without gradient; repeated prompts come from a bounded cache.

        None: what the family's stock pipeline takes where no negative prompt is given.
        """
        ...

    def prepare(self, prompts: Sequence[str | None], advance: Advance, share: tuple[int, int] = (0, 1)) -> None:
        """Embeds prompts and then lets large text encoders go; a family whose encoders are small may do nothing.

        advance: told how many of this share's distinct prompts are done. share: (rank, number of processes), of which
        each embeds its own; a second call without it, once all are done, finds them on the disk that they share.

        Raises UserError where the prompts need more room on disk than `DRAFTPLUS_CACHE_GB` allows.
        """
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of one image's latents; None: the size that the model was trained at."""
        ...

    def scheduler(self, shape: tuple[int, int, int], steps: int) -> Mapping[str, Any]:
        """The scheduler's configuration for images of a shape of latents, and a number of sampling steps.

        What a flow model's stock pipeline computes from them is filled in: `mu`, the shift by resolution, and `sigmas`.
        """
        ...

    def check(self, sampler: SamplerConfig) -> None:
        """Raises UserError for settings that the family does not have."""
        ...

    def guided(self, given: Conditioning, negative: str | None, scale: float) -> Raw:
        """The denoiser under the family's own guidance. given: b rows. negative: the negative prompt, None: as in
        `encode`."""
        ...

    def doubles(self, negative: str | None, scale: float) -> bool:
        """Whether `guided` takes two passes of the denoiser for an image, and not one."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W) float32 (float64 stays float64), clamped to [0, 1], with gradient where enabled.

        What overflowed is NaN.
        """
        ...

    def compile(self) -> None:
        """Has the denoiser's blocks compiled when they are first called, and its convolutions laid out for speed.

        Raises UserError where nothing can be compiled for the device.
        """
        ...

    def as_pipeline(self, scheduler: Any = None) -> Any:
        """The stock pipeline around the networks as they are. scheduler: of stock diffusers; None: the model's."""
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
