"""What a denoiser predicts: under guidance, and in the two forms that solvers and penalties use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftplus.diffusion.schedule import Denoised, Schedule, denoised
from draftplus.diffusion.window import Window
from draftplus.types import Conditioning, Raw

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (latents, timestep, conditioning) -> raw prediction
Denoise = Callable[[Tensor, int], Denoised]  # (latents (b, c, h, w), step index) -> (x0, eps), guidance inside


def classifier_free(predict: Predict, given: Conditioning, negative: Conditioning, scale: float) -> Raw:
    """Classifier-free guidance u + scale * (c - u) in one batched call (Ho and Salimans 2022, arXiv 2207.12598).

    given: b rows. negative: one row, of the negative prompt. As in stock diffusers a scale of at most 1 means no
    guidance, and then one pass. Latents in float32 are guided in float32, whatever the network's precision.
    """
    if scale <= 1:
        return lambda x, timestep: predict(x, timestep, given)
    b = len(given)
    both = Conditioning.concatenate([*[negative] * b, given])

    def raw(x: Tensor, timestep: Tensor) -> Tensor:
        prediction = predict(torch.cat([x, x]), timestep, both)
        without, with_prompt = prediction.to(torch.promote_types(x.dtype, prediction.dtype)).chunk(2)
        return without + scale * (with_prompt - without)

    return raw


def denoiser(raw: Raw, schedule: Schedule, window: Window | None = None) -> Denoise:
    """The denoiser that the sampler, the objectives and the penalties call.

    raw: the guided prediction. window: the network carries gradient in its steps alone, and sees detached latents where
    it says so; None: wherever gradient is enabled. The conversion to (x0, eps) is linear in the latents, and carries
    their gradient in either case.
    """

    def denoise(x: Tensor, index: int) -> Denoised:
        carries = torch.is_grad_enabled() and (window is None or index in window.steps)
        with torch.set_grad_enabled(carries):
            seen = x.detach() if window is not None and window.detach_inputs else x
            prediction = raw(seen, schedule.timestep(index, x.device))
        return denoised(prediction, x, schedule.steps[index], schedule.prediction)

    return denoise
