"""The family of direct reward fine-tuning, as one loss over three small choices: window, estimator, regulariser.

loss = -mean reward + kl_coeff * KL. DRaFT, DRaFT-K, DRaFT-LV: Clark et al. 2023 (arXiv 2309.17400). AlignProp:
Prabhudesai et al. 2023 (arXiv 2310.03739). ReFL: Xu et al. 2023 (arXiv 2304.05977). DRTune: Wu et al. 2024
(arXiv 2405.00760). DRaFT+: any of these with the KL term of `draftplus.diffusion.kl`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from draftplus import rng
from draftplus.config import ObjectiveConfig
from draftplus.diffusion import window as windows
from draftplus.diffusion.guidance import guided
from draftplus.diffusion.kl import kl
from draftplus.diffusion.sampler import Rollout, Visit, sample
from draftplus.diffusion.schedule import Schedule
from draftplus.diffusion.solvers import Solver
from draftplus.diffusion.window import Window
from draftplus.types import Conditioning, Model, Scorer, Scores

Noise = Callable[[str, int], Tensor]  # (stream, draw) -> standard normal (b, c, h, w) on the model's device


@dataclass(frozen=True)
class Problem:
    """What stays the same over a run: how images are made, how they are scored, and what is optimised."""

    model: Model
    scorer: Scorer
    schedule: Schedule
    solver: Solver
    guidance_scale: float
    negative_prompt: str
    objective: ObjectiveConfig
    eta: float = 0.0  # the solver's, which DDPO's probabilities depend on

    def denoiser(self, conditioning: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided denoiser of some prompts."""
        return guided(self.model, conditioning, self.model.encode([self.negative_prompt]), self.guidance_scale)


@dataclass(frozen=True)
class Loss:
    """A scalar with its gradient, and what it was made of, detached: scores (b,), KL (), images (b, 3, H, W)."""

    value: Tensor
    scores: Scores
    kl: Tensor
    images: Tensor


def plan(objective: ObjectiveConfig, total: int, seed: int, step: int) -> Window:
    """The window of an optimizer step, the same on every rank. total: sampling steps."""
    k = total if objective.grad_steps == "all" else int(objective.grad_steps)
    method = objective.method
    if method == "refl":
        return windows.single(rng.integer(min(int(objective.refl.first * total), total - 1), total, seed, "refl", step))
    if method == "alignprop":
        high = objective.alignprop.max_steps or total
        return windows.last(rng.integer(objective.alignprop.min_steps, high + 1, seed, "alignprop", step), total)
    if method == "drtune":
        skipped = rng.integer(0, objective.drtune.early_stop + 1, seed, "drtune/stop", step)
        return windows.spaced(k, total, rng.integer(0, total // k, seed, "drtune/offset", step), skipped)
    return windows.last(k, total)


def prefix(problem: Problem, conditioning: Conditioning, noise: Noise, window: Window) -> Rollout:
    """The gradient-free steps before the window: plain inference, in as large a batch as fits.

    conditioning: b rows. Returns where the tail starts.
    """
    with torch.no_grad():
        return sample(
            problem.denoiser(conditioning), Rollout(noise("x_T", 0)), problem.schedule, problem.solver,
            end=window.first, noise=partial(noise, "solver"),
        )  # fmt: skip


def loss(
    problem: Problem, start: Rollout, window: Window, conditioning: Conditioning, prompts: Sequence[str], noise: Noise
) -> Loss:
    """The loss of the tail: the steps of the window, decoding, the reward, the KL term.

    start: what `prefix` returned for the same b prompts. The mean is over this batch.
    """
    objective = problem.objective
    denoise = problem.denoiser(conditioning)
    rollout = sample(
        denoise, start, problem.schedule, problem.solver, window, begin=window.first,
        noise=partial(noise, "solver"),
    )  # fmt: skip
    images = problem.model.decode(rollout.latents)  # (b, 3, H, W) in [0, 1]
    scores = problem.scorer(images, prompts)  # (b,)
    reward, visits = scores.total, rollout.visits
    if objective.method == "draft_lv":
        copies, more = _renoised(problem, denoise, rollout, prompts, noise)
        reward, visits = torch.stack([reward, *copies]).mean(0), visits + more
    if objective.method == "refl" and objective.refl.hinge is not None:
        value = torch.relu(objective.refl.hinge - reward).mean()
    else:
        value = -reward.mean()
    penalty = torch.zeros((), dtype=value.dtype, device=value.device)
    if objective.kl_coeff > 0:
        with problem.model.reference():
            penalty = kl(visits, denoise, problem.schedule, objective.kl_space)  # type: ignore[arg-type]
        value = value + objective.kl_coeff * penalty
    detached = Scores(scores.total.detach(), {name: part.detach() for name, part in scores.parts.items()})
    return Loss(value, detached, penalty.detach(), images.detach())


def _renoised(
    problem: Problem,
    denoise: Callable[[Tensor, Tensor], Tensor],
    rollout: Rollout,
    prompts: Sequence[str],
    noise: Noise,
) -> tuple[list[Tensor], list[Visit]]:
    """DRaFT-LV's copies: the result re-noised to the last level and denoised once more, each with its own reward."""
    last = len(problem.schedule) - 1
    level = problem.schedule.steps[last]
    clean = rollout.latents.detach()
    rewards, visits = [], []
    for copy in range(problem.objective.draft_lv.samples):
        renoised = Rollout(level.alpha * clean + level.sigma * noise("draft_lv", copy))
        again = sample(
            denoise, renoised, problem.schedule, problem.solver, windows.last(1, last + 1), begin=last,
            noise=partial(noise, f"solver/{copy}"),
        )  # fmt: skip
        rewards.append(problem.scorer(problem.model.decode(again.latents), prompts).total)
        visits.extend(again.visits)
    return rewards, visits
