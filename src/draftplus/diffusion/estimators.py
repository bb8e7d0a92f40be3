"""Estimators: from a finished trajectory to the loss that a method minimises, without its regularisers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from draftplus.diffusion.problem import Estimated, Noise, Problem
from draftplus.diffusion.sampler import Rollout
from draftplus.diffusion.window import last
from draftplus.types import Conditioning

Estimator = Callable[[Problem, Rollout, Conditioning, Sequence[str], Noise], Estimated]


def final_image(
    problem: Problem, rollout: Rollout, conditioning: Conditioning, prompts: Sequence[str], noise: Noise
) -> Estimated:
    """-mean reward of the images where the trajectory ends (DRaFT, Clark et al. 2023, arXiv 2309.17400)."""
    images = problem.model.decode(rollout.latents)  # (b, 3, H, W) in [0, 1]
    scores = problem.scorer(images, prompts)  # (b,)
    return Estimated(-scores.total.mean(), scores, images, rollout.visits)


def hinged(
    problem: Problem, rollout: Rollout, conditioning: Conditioning, prompts: Sequence[str], noise: Noise
) -> Estimated:
    """Mean of ReLU(hinge - reward), where a hinge is given (ReFL, Xu et al. 2023, arXiv 2304.05977)."""
    found = final_image(problem, rollout, conditioning, prompts, noise)
    hinge = problem.objective.refl.hinge
    return found if hinge is None else found._replace(value=torch.relu(hinge - found.scores.total).mean())


def renoised(
    problem: Problem, rollout: Rollout, conditioning: Conditioning, prompts: Sequence[str], noise: Noise
) -> Estimated:
    """The final image and its re-noised copies, averaged (DRaFT-LV, Clark et al. 2023, arXiv 2309.17400).

    A copy is the result, re-noised to the level before the last step and denoised once more, with a reward of its own.
    """
    found, sampler = final_image(problem, rollout, conditioning, prompts, noise), problem.sampler
    end = len(sampler.schedule) - 1
    level = sampler.schedule.steps[end]
    clean = rollout.latents.detach()
    rewards: list[Tensor] = [found.scores.total]
    visits = found.visits
    for copy in range(problem.objective.draft_lv.samples):
        start = Rollout(level.alpha * clean + level.sigma * noise("draft_lv", copy))
        again = sampler.sample(conditioning, start, last(1, end + 1), begin=end, noise=partial(noise, f"solver/{copy}"))
        rewards.append(problem.scorer(problem.model.decode(again.latents), prompts).total)
        visits = visits + again.visits
    return Estimated(-torch.stack(rewards).mean(0).mean(), found.scores, found.images, visits)
