"""One step of DDPO: rollouts, their rewards, then a few updates of the weights by the clipped policy gradient.

Memory grows neither with the number of denoising steps nor with the batch, but for what is remembered of a trajectory:
its latents, which are small (64 images of 10 steps of 8 x 16 x 16: 6 MB; of 50 steps of 4 x 64 x 64: 214 MB), on the
device. Images are scored and dropped, and each step of each micro-batch has its own backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus import rng
from draftplus.data.batches import Batch
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.policy import StepLoss, Trajectory, normalized_advantages, rollout, step_loss
from draftplus.diffusion.problem import Problem, StepPlan
from draftplus.diffusion.regularisers import logged
from draftplus.distributed import sent
from draftplus.evaluation.chunks import chunks
from draftplus.runs.rows import reward_key
from draftplus.training.state import State, whole_or_not
from draftplus.training.step import Metrics, Setup, backward, precisely, saturated
from draftplus.training.task import Abandonable
from draftplus.training.update import skip, update
from draftplus.types import Conditioning


@dataclass(frozen=True)
class Scored:
    """One image of the batch, wherever it was made: its place, prompt, weighted reward, and numbers to be logged."""

    index: int
    prompt: str
    reward: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class Experience:
    """What this process's images of a step were, in the order of the updates; and the scores of all processes'."""

    conditioning: Conditioning
    trajectory: Trajectory
    places: list[int]  # of this process's images among all
    everyone: list[Scored]  # by their place in the batch

    def means(self) -> dict[str, float]:
        """Over the whole batch."""
        names = self.everyone[0].numbers
        return {name: _mean([image.numbers[name] for image in self.everyone]) for name in names}


def ddpo_step(setup: Setup, state: State, abandonable: Abandonable) -> dict[str, float]:
    """One batch of rollouts, and `inner_epochs` x `updates` updates on it. Returns means by name.

    Those of the updates (loss, kl, grad_norm, ddpo/…) are means over the updates too.
    """
    planned = plan(setup.problem.objective, setup.problem.sampler.schedule, setup.config.seed, state.step)
    with precisely(setup, planned):  # the rollouts too, or the first ratios would not be 1
        return _ddpo_step(setup, state, planned, abandonable)


def _ddpo_step(setup: Setup, state: State, planned: StepPlan, abandonable: Abandonable) -> dict[str, float]:
    settings = setup.config.objective.ddpo
    with abandonable():
        made = experience(setup, state.step)
        advantages, history = normalized_advantages(
            [image.reward for image in made.everyone],
            [image.prompt for image in made.everyone],
            state.history,
            settings,
        )
    scores = made.means()
    if not advantages.isfinite().all():
        skip(state, scores, math.nan)
        return {
            "loss": math.nan,
            **dict.fromkeys(logged(setup.config.objective, planned.looks), math.nan),
            "grad_norm": math.nan,
            **scores,
        }
    mine = advantages[made.places]
    size = len(mine) // settings.updates
    setup.problem.model.offload.idle()  # the updates need no images
    parts = [rows for _ in range(settings.inner_epochs) for rows in chunks(len(mine), size)]
    done: list[dict[str, float]] = []
    with whole_or_not(state) if len(parts) > 1 else nullcontext():
        for rows in parts:
            with abandonable():
                means = setup.complete(accumulate_update(setup, made, planned, rows, mine))
            # later passes may find every ratio clipped, and equal rewards give no advantage
            learns = len(parts) == 1 and bool(advantages.any())
            means["grad_norm"] = update(state, setup.config.optim, {**scores, **means}, learns)
            done.append(means)
    state.history = history
    return {
        **{name: _mean([means[name] for means in done]) for name in done[0]},
        **scores,
        "ddpo/advantage_mean": float(advantages.mean()),
        "ddpo/advantage_std": float(advantages.std(correction=0)),
        "ddpo/advantage_clipped": float((advantages.abs() >= settings.adv_clip).double().mean()),
    }


@torch.no_grad()
def experience(setup: Setup, step: int) -> Experience:
    """Rolls out and scores this process's share of a step."""
    problem, sizes = setup.problem, setup.config.train
    given = setup.share(step)
    order = interleaved(len(given), setup.config.objective.ddpo.updates)
    share = Batch([given.prompts[row] for row in order], [given.indices[row] for row in order])
    conditioning = problem.model.encode(share.prompts)
    parts, scored = [], []
    # in the training's own micro-batches, unless told otherwise: what is computed alike is equal to the last bit
    for rows in chunks(len(share), sizes.sampling_batch_size or setup.micro):
        noise = setup.noise(step, share.indices[rows])
        parts.append(rollout(problem, conditioning.rows(rows), noise))
    trajectory = Trajectory.concatenate(parts)
    latents = torch.empty_like(trajectory.latents[:, -1])
    latents[order] = trajectory.latents[:, -1]  # as they were given, for rewards that compare neighbours
    for rows in chunks(len(given), sizes.micro_batch_size):
        with rng.samples(setup.config.seed, step, given.indices[rows]):  # for rewards that draw noise
            scored.append(_score(problem, latents[rows], given.prompts[rows]))
    names, numbers = scored[0].names, torch.cat([part.vector for part in scored], 1).T.tolist()  # read once
    images = [
        Scored(index, prompt, row[0], dict(zip(names, row, strict=True)))
        for index, prompt, row in zip(given.indices, given.prompts, numbers, strict=True)
    ]
    everyone = sorted((image for part in setup.here.gather(images) for image in part), key=lambda image: image.index)
    return Experience(conditioning, trajectory, share.indices, everyone)


def interleaved(length: int, updates: int) -> list[int]:
    """The rows of a share in the order of its updates: every `updates`-th image, so that the ranks do not matter."""
    return [row for first in range(updates) for row in range(first, length, updates)]


def _score(problem: Problem, latents: Tensor, prompts: Sequence[str]) -> Metrics:
    """The numbers of some images, (m, b), the weighted reward first."""
    pictures = problem.model.decode(latents)  # (b, 3, H, W) in [0, 1]
    scores = problem.scorer(pictures, prompts)
    return Metrics.of(
        {
            "reward": scores.total,
            **{reward_key(name): part for name, part in scores.parts.items()},
            "clipped_fraction": saturated(pictures),
        }
    )


def accumulate_update(setup: Setup, made: Experience, planned: StepPlan, part: slice, advantages: Tensor) -> Metrics:
    """Adds the gradient of this process's share of an update, times the loss scale, to the trained parameters.

    part: the rows of `made` that the update is made from. advantages: of all rows. The loss is a mean over the images
    of all processes' shares, and over the steps with variance. Every step of every micro-batch has its own backward
    pass. Returns this share's part of the update's means.
    """
    problem, window = setup.problem, planned.window.steps
    trajectory, conditioning, mine = made.trajectory.rows(part), made.conditioning.rows(part), advantages[part]
    mine = sent(mine.to(trajectory.log_probs.dtype), trajectory.log_probs.device)
    total, steps = len(mine) * setup.here.size, sorted({*window, *planned.keep})
    metrics: Metrics | None = None
    for rows in chunks(len(mine), setup.micro):
        share = (rows.stop - rows.start) / (total * len(window))
        for index in steps:
            with setup.placement.micro_batch(last=rows.stop == len(mine) and index == steps[-1]):
                loss = step_loss(problem, planned, trajectory.rows(rows), index, conditioning.rows(rows), mine[rows])
                backward(loss.value * (share * setup.loss_scale), rows)
            new = _metrics(loss, problem.objective.ddpo.clip) * share
            metrics = new if metrics is None else metrics + new
    assert metrics is not None
    return metrics


def _metrics(part: StepLoss, clip: float) -> Metrics:
    ratios = torch.ones_like(part.value) if part.ratios is None else part.ratios
    told = part.ratios is not None
    return Metrics.of(
        {
            "loss": part.value.detach(),
            **part.penalties,
            "ddpo/ratio": ratios.mean() * told,
            "ddpo/approx_kl": ratios.log().square().mean() / 2,
            "ddpo/ratio_clipped": ((ratios - 1).abs() > clip).to(ratios).mean(),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
