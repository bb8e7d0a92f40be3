"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) in one batched call of the denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftplus.types import Conditioning, Model

Denoise = Callable[[Tensor, Tensor], Tensor]  # (latents (b, c, h, w), timestep ()) -> raw prediction (b, c, h, w)


def guided(model: Model, conditioning: Conditioning, unconditional: Conditioning, scale: float) -> Denoise:
    """The denoiser under guidance: u + scale * (c - u), u without and c with the prompt.

    conditioning: b rows. unconditional: one row, the negative prompt. As in stock diffusers a scale of at most 1 means
    no guidance, and then one pass.
    """
    if scale <= 1:
        return lambda x, timestep: model.predict(x, timestep, conditioning)
    b = len(conditioning)
    both = Conditioning.concatenate([unconditional.rows(torch.zeros(b, dtype=torch.long)), conditioning])

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        raw = model.predict(torch.cat([x, x]), timestep, both)
        without, given = raw.to(torch.promote_types(torch.float32, raw.dtype)).chunk(2)
        return without + scale * (given - without)

    return denoise
