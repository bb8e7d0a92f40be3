"""Numbers that are not finite: which part of making an image they came from, and at which step."""

from __future__ import annotations

import torch
from torch import Tensor

from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.schedule import Denoised
from draftplus.errors import UserError
from draftplus.types import Model


class Overflow(UserError):
    """A training step whose images are not finite."""


class Watch:
    """Remembers which predictions of a denoiser were finite, without waiting for the device."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []  # (step index, whether all was finite)

    def look(self, index: int, predicted: Tensor) -> None:
        self.seen.append((index, predicted.isfinite().all()))

    def over(self, denoise: Denoise) -> Denoise:
        """A denoiser whose predictions are looked at."""

        def watched(x: Tensor, index: int) -> Denoised:
            now = denoise(x, index)
            self.look(index, now.eps)
            return now

        return watched

    def check(self, latents: Tensor, total: int, model: Model) -> None:
        """UserError for final latents that are not finite. total: sampling steps. model: that the denoiser is of."""
        if latents.isfinite().all():
            return
        dtype = precision_of(model)
        step = next((index for index, finite in self.seen if not finite), total - 1) + 1
        raise UserError(
            f"the latents are not finite from sampling step {step} of {total} on: the denoiser overflowed in "
            f"{_name(dtype)}; {_remedy(dtype, 'check the weights and sampler.guidance_scale')}"
        )


def check_decoded(images: Tensor, model: Model) -> None:
    """UserError for images that are not finite, of latents that are. model: that they are of."""
    if not images.isfinite().all():
        dtype = precision_of(model)
        raise UserError(
            "the images are not finite although the latents are: after the last sampling step the autoencoder "
            f"overflowed in {_name(dtype)};\n{_remedy(dtype, 'check its weights')}"
            + (', or put "force_upcast": true into its config.json' if dtype == torch.float16 else "")
        )


def precision_of(model: Model) -> torch.dtype:
    """That of the denoiser's frozen weights; of its tuned ones where all are."""
    trained = {id(parameter) for parameter in model.tuned.trainable().values()}
    parameters = list(model.tuned.networks()[0].parameters())
    return next((p.dtype for p in parameters if id(p) not in trained), parameters[0].dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy(dtype: torch.dtype, otherwise: str) -> str:
    if dtype == torch.float16:
        return "use model.dtype=bfloat16 or model.dtype=float32"
    return "use model.dtype=float32" if dtype == torch.bfloat16 else otherwise
