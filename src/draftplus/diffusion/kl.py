"""The KL term of DRaFT+: how far the trained prediction moved from the frozen model's.

The penalty is the mean over (gradient steps, b, c, h, w) of (eps_theta - eps_ref)^2, both under guidance and at the
same x_t, the reference without gradient; no 1/2 and no 1/sigma^2 (NVIDIA NeMo-Aligner, DRaFT+).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.sampler import Visit
from draftplus.diffusion.schedule import Schedule, denoised

Space = Literal["noise", "x0"]


def kl(visits: Sequence[Visit], reference: Denoise, schedule: Schedule, space: Space = "noise") -> Tensor:
    """The penalty over all steps that carried gradient, a scalar.

    reference: the frozen, guided denoiser. space: compare the predicted noises, or the predicted clean latents.
    """
    return torch.stack([_squared_distance(visit, reference, schedule, space) for visit in visits]).mean()


def _squared_distance(visit: Visit, reference: Denoise, schedule: Schedule, space: Space) -> Tensor:
    with torch.no_grad():
        raw = reference(visit.latents, schedule.timestep(visit.step, visit.latents.device))
    # both conversions see the same x_t, attached, so that its linear terms cancel in value and in gradient
    frozen = denoised(raw, visit.latents, schedule.steps[visit.step], schedule.prediction)
    if space == "x0":
        return (visit.now.x0 - frozen.x0).square().mean()
    return (visit.now.eps - frozen.eps).square().mean()
