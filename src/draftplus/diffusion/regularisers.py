"""What keeps the trained model near the frozen one: penalties that are added to a method's loss.

A regulariser is an entry of `REGULARISERS`. It says at which steps of a trajectory it looks, and is given those steps'
latents, with the prediction where the step carried gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from draftplus import rng
from draftplus.config import ObjectiveConfig
from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.sampler import Visit
from draftplus.diffusion.schedule import Denoised, Schedule, Step
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

    weight: its factor in the loss; 0: it is not computed. steps: (objective, window, schedule, seed, optimizer step) ->
    where it looks, with a factor each, the same on every rank; steps without gradient are evaluated once more for it.
    distance: (objective, trained, frozen, visit) -> a scalar. The penalty is the mean over the visits of factor *
    distance, and may be taken in parts.
    """

    weight: Callable[[ObjectiveConfig], float]
    steps: Callable[[ObjectiveConfig, Window, Schedule, int, int], Mapping[int, float]]
    distance: Callable[[ObjectiveConfig, Denoise, Denoise, Visit], Tensor]


def kl(objective: ObjectiveConfig, trained: Denoise, frozen: Denoise, visit: Visit) -> Tensor:
    """The KL term of DRaFT+ at one step: the mean over (b, c, h, w) of (eps_theta - eps_ref)^2.

    Both are under guidance and at the same x_t, the reference without gradient; no 1/2 and no 1/sigma^2 (NVIDIA
    NeMo-Aligner, DRaFT+). objective.kl_space: compare the predicted noises, clean latents, or flow matching's
    velocities u = eps - x0.
    """
    step, latents, now = visit
    of = SPACES[objective.kl_space]
    ours = now if now is not None else trained(latents, step)
    # both conversions see the same x_t, attached, so that its linear terms cancel in value and in gradient
    return (of(ours) - of(frozen(latents, step))).square().mean()


def prefix_coeff(objective: ObjectiveConfig) -> float:
    """The weight of the KL term at the steps without gradient."""
    if objective.kl_steps != "trajectory":
        return 0.0
    return objective.kl_coeff if objective.kl_prefix_coeff is None else objective.kl_prefix_coeff


def rest(window: Window, total: int) -> list[int]:
    """The steps of a trajectory that carry no gradient."""
    end = total if window.x0_at is None else window.x0_at + 1
    return [step for step in range(end) if step not in window.steps]


def path_weights(objective: ObjectiveConfig, schedule: Schedule, steps: Sequence[int]) -> list[float]:
    """The weight of each of these steps in the KL term, of mean 1 (`objective.kl_weights`).

    uniform: 1. noise_level: sigma_t of x_t = alpha_t x_0 + sigma_t eps. path: that of the KL divergence between the two
    models' ancestral samplers, where a step from t to s adds (SNR_s - SNR_t) / 2 * |x0_theta - x0_ref|^2 with
    SNR = alpha^2 / sigma^2 (Kingma et al. 2021, arXiv 2107.00630, equation 13); converted to `objective.kl_space`. The
    last step, whose SNR_s is infinite where it leads to the image, is given the weight of the step before it.
    """
    if objective.kl_weights == "uniform":
        return [1.0] * len(steps)
    if objective.kl_weights == "noise_level":
        weights = [schedule.steps[step].sigma for step in steps]
    else:
        finite = [step for step in range(len(schedule)) if schedule.steps[step].next_sigma > 0]
        latest = finite[-1] if finite else 0
        weights = [_divergence(schedule.steps[min(step, latest)], objective.kl_space) for step in steps]
    mean = sum(weights) / len(weights)
    return [weight / mean for weight in weights] if mean > 0 else [1.0] * len(steps)


def _divergence(step: Step, space: str) -> float:
    if step.next_sigma == 0:  # a schedule of one step
        return 1.0
    growth = (step.next_alpha / step.next_sigma) ** 2 - (step.alpha / step.sigma) ** 2
    if space == "noise":  # at pure noise it is known, and no distance is left to be weighted
        factor = step.sigma / step.alpha if step.alpha > 0 else 0.0
    else:  # at one x_t of a flow, x_0 = x_t - sigma u
        factor = 1.0 if space == "x0" else step.sigma
    return max(growth, 0.0) / 2 * factor**2


def drawn_steps(
    objective: ObjectiveConfig, window: Window, schedule: Schedule, seed: int, step: int
) -> dict[int, float]:
    """Steps without gradient, drawn for one optimizer step, with factors by which the mean over them is unbiased.

    They are cut into `objective.kl_draws` stretches of nearly equal length, and one step is drawn from each. So the
    expectation of the mean over the drawn steps of factor * distance is the mean over all of weight * distance.
    """
    steps = rest(window, len(schedule))
    if not steps:
        return {}
    weights = dict(zip(steps, path_weights(objective, schedule, steps), strict=True))
    draws = min(objective.kl_draws, len(steps))
    bounds = [len(steps) * part // draws for part in range(draws + 1)]
    drawn = {}
    for draw, (low, high) in enumerate(pairwise(bounds)):
        at = steps[rng.integer(low, high, seed, "kl", step, draw)]
        drawn[at] = weights[at] * (high - low) * draws / len(steps)
    return drawn


WINDOW, PREFIX = "kl/window", "kl/prefix"
REGULARISERS: dict[str, Regulariser] = {
    WINDOW: Regulariser(
        weight=lambda objective: objective.kl_coeff,
        steps=lambda objective, window, schedule, seed, step: dict.fromkeys(window.steps, 1.0),
        distance=kl,
    ),
    PREFIX: Regulariser(weight=prefix_coeff, steps=drawn_steps, distance=kl),
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


class Penalties(NamedTuple):
    """What some visits add: to each active regulariser's penalty, a scalar; and the KL term's distance by step, a mean
    over the visits, detached."""

    added: Mapping[str, Tensor]
    by_step: Mapping[int, Tensor]


NOTHING = Penalties({}, {})


def penalties(
    objective: ObjectiveConfig,
    looks: Mapping[str, Mapping[int, float]],
    trained: Denoise,
    frozen: Denoise,
    visits: Sequence[Visit],
    over: Mapping[str, float],
) -> Penalties:
    """What these visits add to each active regulariser's penalty; nothing where it looks at none of them.

    looks: the steps and their factors, by regulariser. over: by regulariser, of how many visits its penalty is the
    mean; the rest of them is added in other calls.
    """
    added, by_step = {}, {}
    for name, one in active(objective).items():
        seen = [visit for visit in visits if visit.step in looks[name]]
        if not seen:
            continue
        distances = [one.distance(objective, trained, frozen, visit) for visit in seen]
        terms = [looks[name][visit.step] * distance for visit, distance in zip(seen, distances, strict=True)]
        added[name] = torch.stack(terms).sum() / over[name]
        if name in (WINDOW, PREFIX):
            for step in {visit.step for visit in seen}:
                there = [distances[row].detach() for row, visit in enumerate(seen) if visit.step == step]
                by_step[step] = torch.stack(there).mean()
    return Penalties(added, by_step)


def weighted(objective: ObjectiveConfig, value: Tensor, found: Penalties) -> Tensor:
    """A loss and its penalties, a scalar."""
    for name, penalty in found.added.items():
        value = value + REGULARISERS[name].weight(objective) * penalty
    return value


def logged(objective: ObjectiveConfig, looks: Mapping[str, Mapping[int, float]]) -> list[str]:
    """The names of what `told` gives. kl is the sum of its parts; where there are two, they are told too, and the
    distance at each step, such as kl/step/3, counted from 0 at pure noise."""
    parts: list[str] = []
    if prefix_coeff(objective) > 0:
        steps = sorted({step for name in (WINDOW, PREFIX) for step in looks.get(name, ())})
        parts = [WINDOW, PREFIX, *(f"kl/step/{step}" for step in steps)]
    return ["kl", *parts, *(name for name in REGULARISERS if name not in (WINDOW, PREFIX))]


def told(
    objective: ObjectiveConfig, looks: Mapping[str, Mapping[int, float]], value: Tensor, found: Penalties
) -> dict[str, Tensor]:
    """Every regulariser's penalty, detached; 0 where there is none."""
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    every = {name: penalty.detach() for name, penalty in found.added.items()}
    every["kl"] = every.get(WINDOW, zero) + every.get(PREFIX, zero)
    every |= {f"kl/step/{step}": distance for step, distance in found.by_step.items()}
    return {name: every.get(name, zero) for name in logged(objective, looks)}
