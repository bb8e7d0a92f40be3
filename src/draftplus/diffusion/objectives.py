"""One optimizer step of the gradient methods: its plan, the gradient-free steps before its window, and its loss.

loss = the method's estimate + the sum of weight * penalty over its regularisers; for DRaFT and DRaFT+ this is
-mean reward + kl_coeff * KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.problem import Noise, Problem, StepPlan
from draftplus.diffusion.regularisers import REGULARISERS, active, penalties
from draftplus.diffusion.sampler import Rollout, Visit
from draftplus.diffusion.schedule import Schedule
from draftplus.diffusion.window import Window
from draftplus.types import Conditioning, Scores


@dataclass(frozen=True)
class Loss:
    """A scalar with its gradient, and what it was made of, detached.

    scores: (b,) each. penalties: () each, by regulariser, 0 where it has no weight. images: (b, 3, H, W).
    """

    value: Tensor
    scores: Scores
    penalties: Mapping[str, Tensor]
    images: Tensor


def plan(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> StepPlan:
    """The plan of an optimizer step, the same on every rank."""
    window = METHODS[objective.method].window(objective, schedule, seed, step)
    return plan_around(window, objective, schedule, seed, step)


def plan_around(
    window: Window, objective: ObjectiveConfig, schedule: Schedule, seed: int = 0, step: int = 0
) -> StepPlan:
    """The plan with this window."""
    return StepPlan(
        window,
        {
            name: tuple(one.steps(objective, window, len(schedule), seed, step))
            for name, one in active(objective).items()
        },
    )


def prefix(problem: Problem, conditioning: Conditioning, noise: Noise, plan: StepPlan) -> Rollout:
    """The gradient-free steps before the window: plain inference, in as large a batch as fits.

    conditioning: b rows. Returns where the tail starts.
    """
    with torch.no_grad():
        return problem.sampler.sample(
            conditioning, Rollout(noise("x_T", 0)), end=plan.window.first, noise=partial(noise, "solver"),
            keep=plan.keep,
        )  # fmt: skip


def loss(
    problem: Problem, start: Rollout, plan: StepPlan, conditioning: Conditioning, prompts: Sequence[str], noise: Noise
) -> Loss:
    """The loss of the tail: the steps of the window, decoding, the reward, the regularisers.

    start: what `prefix` returned for the same b prompts. The mean is over this batch.

    Raises ValueError for a method that does not differentiate the reward.
    """
    objective, sampler = problem.objective, problem.sampler
    estimate = METHODS[objective.method].estimate
    if estimate is None:
        raise ValueError(f"method {objective.method} has no loss of a trajectory's end")
    rollout = sampler.sample(
        conditioning, start, plan.window, begin=plan.window.first, noise=partial(noise, "solver"), keep=plan.keep
    )
    found = estimate(problem, rollout, conditioning, prompts, noise)
    visits = found.visits + [Visit(step, latents, None) for step, latents in sorted(rollout.kept.items())]
    added = penalties(
        objective, plan.looks, sampler.denoiser(conditioning), sampler.frozen(conditioning), visits
    ) if plan.looks else {}  # fmt: skip
    value = found.value
    for name, penalty in added.items():
        value = value + REGULARISERS[name].weight(objective) * penalty
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    scores = Scores(found.scores.total.detach(), {name: part.detach() for name, part in found.scores.parts.items()})
    return Loss(value, scores, {name: added.get(name, zero).detach() for name in REGULARISERS}, found.images.detach())
