"""What keeps the trained model near the frozen one: penalties that are added to a method's loss.

A regulariser is an entry of `REGULARISERS`. It says at which steps of a trajectory it looks, and is given those steps'
latents, with the prediction where the step carried gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.sampler import Visit
from draftplus.diffusion.schedule import Denoised, Schedule
from draftplus.diffusion.window import Window
from draftplus.errors import UserError

SPACES: dict[str, Callable[[Denoised], Tensor]] = {
    "noise": lambda now: now.eps,
    "x0": lambda now: now.x0,
    "velocity": lambda now: now.eps - now.x0,  # of flow matching
}


@dataclass(frozen=True)
class Regulariser:
    """A penalty on the difference of two models.

    weight: its factor in the loss; 0: it is not computed. steps: (objective, window, number of sampling steps, seed,
    optimizer step) -> where it looks, the same on every rank; steps without gradient are evaluated once more for it.
    penalty: (objective, trained, frozen, visits) -> a scalar, a mean over the visits, which may be taken in parts.
    """

    weight: Callable[[ObjectiveConfig], float]
    steps: Callable[[ObjectiveConfig, Window, int, int, int], Sequence[int]]
    penalty: Callable[[ObjectiveConfig, Denoise, Denoise, Sequence[Visit]], Tensor]


def kl(objective: ObjectiveConfig, trained: Denoise, frozen: Denoise, visits: Sequence[Visit]) -> Tensor:
    """The KL term of DRaFT+: the mean over (visits, b, c, h, w) of (eps_theta - eps_ref)^2.

    Both are under guidance and at the same x_t, the reference without gradient; no 1/2 and no 1/sigma^2 (NVIDIA
    NeMo-Aligner, DRaFT+). objective.kl_space: compare the predicted noises, clean latents, or flow matching's
    velocities u = eps - x0.
    """
    of = SPACES[objective.kl_space]
    distances = []
    for step, latents, now in visits:
        ours = now if now is not None else trained(latents, step)
        # both conversions see the same x_t, attached, so that its linear terms cancel in value and in gradient
        distances.append((of(ours) - of(frozen(latents, step))).square().mean())
    return torch.stack(distances).mean()


REGULARISERS: dict[str, Regulariser] = {
    "kl": Regulariser(
        weight=lambda objective: objective.kl_coeff,
        steps=lambda objective, window, total, seed, step: window.steps,
        penalty=kl,
    ),
}


def check_space(objective: ObjectiveConfig, schedule: Schedule) -> None:
    """Refuses a space that the model has not.

    Raises UserError that names the key and a remedy.
    """
    if objective.kl_space == "velocity" and schedule.prediction != "flow":
        raise UserError(
            "objective.kl_space=velocity is for flow-matching models, and this one is none; use noise or x0"
        )


def active(objective: ObjectiveConfig) -> dict[str, Regulariser]:
    """Those with a weight."""
    return {name: one for name, one in REGULARISERS.items() if one.weight(objective) > 0}


def penalties(
    objective: ObjectiveConfig,
    looks: Mapping[str, Sequence[int]],
    trained: Denoise,
    frozen: Denoise,
    visits: Sequence[Visit],
    over: Mapping[str, float],
) -> dict[str, Tensor]:
    """What these visits add to each active regulariser's penalty, a scalar; nothing where it looks at none of them.

    looks: the steps, by regulariser. over: by regulariser, of how many visits its penalty is the mean; the rest of them
    is added in other calls.
    """
    added = {}
    for name, one in active(objective).items():
        seen = [visit for visit in visits if visit.step in looks[name]]
        if seen:
            added[name] = one.penalty(objective, trained, frozen, seen) * (len(seen) / over[name])
    return added


def weighted(objective: ObjectiveConfig, value: Tensor, added: Mapping[str, Tensor]) -> Tensor:
    """A loss and its penalties, a scalar."""
    for name, penalty in added.items():
        value = value + REGULARISERS[name].weight(objective) * penalty
    return value


def told(value: Tensor, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every regulariser's penalty, detached; 0 where there is none."""
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return {name: added.get(name, zero).detach() for name in REGULARISERS}
