"""One optimizer step of the gradient methods: its plan, the gradient-free steps before its window, and its loss.

loss = the method's estimate + the sum of weight * penalty over its regularisers; for DRaFT and DRaFT+ this is
-mean reward + kl_coeff * KL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.problem import Noise, Problem, StepPlan
from draftplus.diffusion.regularisers import NOTHING, Penalties, active, penalties, told, weighted
from draftplus.diffusion.sampler import Rollout, Visit, sample
from draftplus.diffusion.schedule import Schedule
from draftplus.diffusion.window import Window
from draftplus.types import Conditioning, Scores


@dataclass(frozen=True)
class Loss:
    """A scalar with its gradient, and what it was made of, detached.

    scores: (b,) each. penalties: () each, by regulariser, 0 where it has no weight. images: (b, 3, H, W). kept: latents
    of steps without gradient, whose part of the penalties `kept_loss` adds. over: by regulariser, of how many visits
    its penalty is the mean, those included.
    """

    value: Tensor
    scores: Scores
    penalties: Mapping[str, Tensor]
    images: Tensor
    kept: Mapping[int, Tensor]
    over: Mapping[str, float]


class KeptLoss(NamedTuple):
    """What a step without gradient adds to a loss: a scalar with its gradient, and the penalties, detached."""

    value: Tensor
    penalties: Mapping[str, Tensor]


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
        {name: one.steps(objective, window, schedule, seed, step) for name, one in active(objective).items()},
    )


def prefix(
    problem: Problem, conditioning: Conditioning, noise: Noise, plan: StepPlan, start: Rollout | None = None
) -> Rollout:
    """The gradient-free steps before the window: plain inference, in as large a batch as fits.

    conditioning: b rows. start: what `gated` returned for them; None: pure noise. Returns where the tail starts.
    """
    begin = 0 if start is None else problem.sampler.gate
    return _inferred(problem, conditioning, noise, start, begin, plan.window.first, plan.keep)


def gated(problem: Problem, conditioning: Conditioning, noise: Noise, keep: Collection[int] = ()) -> Rollout:
    """The steps before the gate, which do not depend on what is trained.

    keep: steps whose latents are remembered, for penalties that look there.
    """
    return _inferred(problem, conditioning, noise, None, 0, problem.sampler.gate, keep)


@torch.no_grad()
def _inferred(
    problem: Problem, conditioning: Conditioning, noise: Noise, start: Rollout | None, begin: int, end: int,
    keep: Collection[int],
) -> Rollout:  # fmt: skip
    sampler = problem.sampler
    denoise = sampler.drawing(conditioning)  # embeds the negative prompt
    problem.model.offload.idle()
    if start is None:
        start = sampler.start(noise("x_T", 0))
    return sample(
        denoise, start, sampler.schedule, sampler.solver, begin=begin, end=end, noise=partial(noise, "solver"),
        keep=keep,
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
    visited = [visit.step for visit in found.visits] + list(rollout.kept)
    over = {name: sum(step in steps for step in visited) for name, steps in plan.looks.items()}
    added = _penalties(problem, plan, conditioning, found.visits, over)
    scores = Scores(found.scores.total.detach(), {name: part.detach() for name, part in found.scores.parts.items()})
    value = weighted(objective, found.value, added)
    return Loss(value, scores, told(objective, plan.looks, value, added), found.images.detach(), rollout.kept, over)


def kept_loss(problem: Problem, plan: StepPlan, part: Loss, step: int, conditioning: Conditioning) -> KeptLoss:
    """What regularisers say of a step without gradient, at which the trained model is evaluated once more.

    part: what `loss` returned for the same b prompts. Each such step has a backward pass of its own, so that memory
    does not grow with their number.
    """
    visit = Visit(step, part.kept[step], None)
    added = _penalties(problem, plan, conditioning, [visit], part.over)
    value = weighted(problem.objective, torch.zeros_like(part.value), added)
    return KeptLoss(value, told(problem.objective, plan.looks, value, added))


def _penalties(
    problem: Problem,
    plan: StepPlan,
    conditioning: Conditioning,
    visits: Sequence[Visit],
    over: Mapping[str, float],
) -> Penalties:
    if not plan.looks:
        return NOTHING
    trained, frozen = problem.sampler.denoiser(conditioning), problem.sampler.frozen(conditioning)
    return penalties(problem.objective, plan.looks, trained, frozen, visits, over)
