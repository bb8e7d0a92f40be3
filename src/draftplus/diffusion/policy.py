"""DDPO: sampling as a sequence of random decisions, and the clipped policy gradient on it.

With eta > 0 each DDIM step draws the next latents from a Gaussian around a mean that the denoiser predicts, so a
trajectory has a probability, and the reward needs no gradient: what scored above the average is made more probable.
Black et al. 2023 (arXiv 2305.13301, DDPO with importance sampling), with the clipping of PPO (Schulman et al. 2017,
arXiv 1707.06347). A step's log-probability is the mean over latent dimensions, not their sum, which is what makes a
clip as small as 1e-4 sensible. Steps without variance have no density and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from draftplus.config.objective import DdpoConfig
from draftplus.diffusion.problem import Noise, Problem, StepPlan
from draftplus.diffusion.regularisers import NOTHING, penalties, told, weighted
from draftplus.diffusion.sampler import Visit, sample
from draftplus.diffusion.schedule import Denoised, Schedule
from draftplus.diffusion.solvers import StepNoise, ddim_deviation, ddim_log_prob
from draftplus.types import Conditioning

History = Mapping[str, Sequence[float]]  # prompt -> its latest rewards, the newest last
SMALLEST_DEVIATION = 1e-6  # is added to the rewards' deviation, which is 0 where all are equal


@dataclass(frozen=True)
class Trajectory:
    """Whole trajectories of b images.

    latents: (b, T + 1, c, h, w) from pure noise to the image. log_probs: (b, s), of the trained steps, in order: those
    with variance, from the gate on.
    """

    latents: Tensor
    log_probs: Tensor

    def rows(self, index: slice) -> Trajectory:
        """Some of the batch."""
        return Trajectory(self.latents[index], self.log_probs[index])

    @staticmethod
    def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
        """The batches of all parts, in order."""
        return Trajectory(torch.cat([p.latents for p in parts]), torch.cat([p.log_probs for p in parts]))


class StepLoss(NamedTuple):
    """A scalar with its gradient, and, detached, the penalties () by regulariser and the ratios of probabilities (b,).

    ratios: None at a step without a probability, at which only a regulariser looks.
    """

    value: Tensor
    penalties: dict[str, Tensor]
    ratios: Tensor | None


@torch.no_grad()
def rollout(problem: Problem, conditioning: Conditioning, noise: Noise) -> Trajectory:
    """Samples b images and remembers how. The adapters must not be folded, so that the first ratio is exactly 1.

    conditioning: b rows. noise: that of the images, as in the other methods.
    """
    sampler = problem.sampler
    start, fresh = sampler.start(noise("x_T", 0)), partial(noise, "solver")
    latents, log_probs = [start.latents], []

    def remembering(
        schedule: Schedule, index: int, x: Tensor, now: Denoised, previous: Tensor | None, noise: StepNoise | None
    ) -> Tensor:
        after = sampler.solver(schedule, index, x, now, previous, noise)
        latents.append(after)
        if index >= sampler.gate and ddim_deviation(schedule.steps[index], sampler.eta) > 0:
            log_probs.append(ddim_log_prob(schedule.steps[index], now, sampler.eta, after))
        return after

    denoise = sampler.drawing(conditioning)  # embeds the negative prompt
    problem.model.offload.idle()
    sample(denoise, start, sampler.schedule, remembering, noise=fresh)
    latents[0] = start.latents.to(latents[-1])
    return Trajectory(torch.stack(latents, 1), torch.stack(log_probs, 1))


def step_loss(
    problem: Problem, plan: StepPlan, trajectory: Trajectory, index: int, conditioning: Conditioning, advantages: Tensor
) -> StepLoss:
    """The loss of one step of remembered trajectories, a mean over its b images.

    plan: its window holds the steps with variance, in order; over them the losses are meant to be averaged. index: a
    step that it looks at. advantages: (b,). The regularisers are those of the other methods, at this step's latents.
    """
    objective, sampler = problem.objective, problem.sampler
    x = trajectory.latents[:, index]
    denoise = sampler.denoiser(conditioning)
    now, ratios = denoise(x, index), None
    value = torch.zeros((), dtype=now.x0.dtype, device=x.device)
    if index in plan.window.steps:
        step, place = sampler.schedule.steps[index], plan.window.steps.index(index)
        log_prob = ddim_log_prob(step, now, sampler.eta, trajectory.latents[:, index + 1])  # (b,)
        ratios = torch.exp(log_prob - trajectory.log_probs[:, place])
        value = surrogate(ratios, advantages.to(ratios), objective.ddpo.clip).mean()
    added = NOTHING
    if plan.looks:
        # a penalty's mean is over the steps that it looks at, which need not be as many as the window's
        over = {name: len(steps) / len(plan.window.steps) for name, steps in plan.looks.items()}
        frozen = sampler.frozen(conditioning)
        added = penalties(objective, plan.looks, denoise, frozen, [Visit(index, x, now)], over)
        # those of single steps are no means over the window, by whose length the others are divided later
        by_step = {at: distance * len(plan.window.steps) for at, distance in added.by_step.items()}
        added = added._replace(by_step=by_step)
    value = weighted(objective, value, added)
    return StepLoss(value, told(objective, plan.looks, value, added), None if ratios is None else ratios.detach())


def surrogate(ratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective with its sign turned, to be minimised; all (b,).

    The smaller of two gains counts. So the gradient ends where a ratio has already moved by `clip` to the side that its
    advantage asks for, and only there.
    """
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def normalized_advantages(
    rewards: Sequence[float], prompts: Sequence[str], history: History, settings: DdpoConfig
) -> tuple[Tensor, History]:
    """How much better than usual each image is, in deviations; and the history with these rewards in it.

    rewards, prompts: of the whole batch, on all ranks. A prompt's mean and (population) deviation are over its latest
    rewards, these included; those of the batch serve as long as it has fewer than `min_history`. Advantages beyond
    `adv_clip` are cut. Returns (n,) float64 on the CPU; where a reward is not finite all are NaN, and nothing is
    remembered.
    """
    given = torch.tensor(rewards, dtype=torch.float64)
    if not given.isfinite().all():
        return torch.full_like(given, torch.nan), history
    result = (given - given.mean()) / (given.std(correction=0) + SMALLEST_DEVIATION)
    if settings.history is not None:
        longer = dict(history)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            known = [*history.get(prompt, ()), *given[rows].tolist()]
            longer[prompt] = known[-settings.history :]
            known = known[-max(settings.history, len(rows)) :]  # all of this batch's, however many
            if len(known) >= settings.min_history:
                usual = torch.tensor(known, dtype=torch.float64)
                result[rows] = (given[rows] - usual.mean()) / (usual.std(correction=0) + SMALLEST_DEVIATION)
        history = longer
    return result.clamp(-settings.adv_clip, settings.adv_clip), history
