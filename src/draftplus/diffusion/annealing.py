"""Annealed importance guidance: from the base model at pure noise to the tuned one at the image (arXiv 2409.06493)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from draftplus.errors import UserError

if TYPE_CHECKING:  # a schedule is checked without torch
    from torch import Tensor

    from draftplus.diffusion.guidance import Denoise
    from draftplus.diffusion.schedule import Denoised


def anneal_weights(text: str, total: int) -> list[float]:
    """The tuned model's share w_i at step i of `total`, i = 0 at pure noise.

    text: `linear` w = i/T, `power:p` w = (i/T)^p, `step:f` w = 1 once i/T >= f, `base` 0, `tuned` 1.

    Raises UserError for anything else.
    """
    name, _, number = text.partition(":")
    fractions = [i / total for i in range(total)]
    try:
        if name == "linear" and not number:
            return fractions
        if name == "power" and float(number) > 0:
            return [f ** float(number) for f in fractions]
        if name == "step" and 0 <= float(number) <= 1:
            return [float(f >= float(number)) for f in fractions]
        if name in ("base", "tuned") and not number:
            return [float(name == "tuned")] * total
    except ValueError:
        pass
    raise UserError(f"anneal '{text}': choose linear, power:P with P above 0, step:F with F in [0, 1], base or tuned")


def annealed(tuned: Denoise, base: Denoise, weights: Sequence[float]) -> Denoise:
    """(1 - w_i) * base + w_i * tuned at each step i; where w is 0 or 1 only one of the models is evaluated.

    tuned, base: the guided denoisers of one model, whose adapters must not be folded.
    """

    from draftplus.diffusion.schedule import Denoised

    def blended(x: Tensor, index: int) -> Denoised:
        w = weights[index]
        if w in (0, 1):
            return (tuned if w else base)(x, index)
        ours, theirs = tuned(x, index), base(x, index)
        return Denoised(*((1 - w) * b + w * t for t, b in zip(ours, theirs, strict=True)))

    return blended
