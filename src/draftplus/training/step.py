"""One step of the gradient methods: an inference prefix in large batches, then the tail in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus import rng
from draftplus.chunks import SAMPLING_BATCH, chunks
from draftplus.config import Config
from draftplus.data.batches import Batch, batch
from draftplus.diffusion.objectives import Loss, Noise, Problem, loss, plan, prefix
from draftplus.diffusion.sampler import Rollout
from draftplus.distributed import World
from draftplus.training.checkpoint import State
from draftplus.training.placement import reduce_step
from draftplus.training.update import update

Shape = tuple[int, int, int]
Abandonable = Callable[[], AbstractContextManager[object]]  # around work that a stop may throw away
FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Setup:
    """What all steps of a run have in common.

    prompts: those to train on. shape: (c, h, w) of one image's latents. micro: images per backward pass.
    """

    config: Config
    problem: Problem
    prompts: Sequence[str]
    shape: Shape
    micro: int
    here: World

    def share(self, step: int) -> Batch:
        """This process's images of a step."""
        size, per_prompt = self.config.train.global_batch_size, self.config.data.images_per_prompt
        return batch(self.prompts, step, self.config.seed, size, per_prompt, self.here.rank, self.here.size)

    @property
    def loss_scale(self) -> float:
        """A factor during the backward pass, which keeps gradients in float16's range."""
        return FLOAT16_LOSS_SCALE if self.config.model.dtype == "float16" else 1.0

    def reduce(self, metrics: Metrics) -> dict[str, float]:
        """Sums gradients and metrics over all processes. Returns the metrics by name."""
        parameters = list(self.problem.model.trainable().values())
        return metrics.named(reduce_step(parameters, metrics.vector, self.here))


def gradient_step(setup: Setup, state: State, abandonable: Abandonable) -> dict[str, float]:
    """One step of any method but DDPO, which is one update of the weights. Returns its means, by name."""
    sizes = setup.config.train
    with abandonable():
        metrics = accumulate(
            setup.problem, setup.share(state.step), setup.shape, setup.config.seed, state.step,
            sizes.global_batch_size, setup.micro, sizes.sampling_batch_size, setup.loss_scale,
        )  # fmt: skip
        means = setup.reduce(metrics)
    return {**means, "grad_norm": update(state, setup.config.optim, means)}


@dataclass(frozen=True)
class Metrics:
    """Means over an optimizer step's images, and the names that `vector` lists them by."""

    names: tuple[str, ...]
    vector: Tensor

    @staticmethod
    def of(values: Mapping[str, Tensor]) -> Metrics:
        """Scalars by name."""
        wide = [value.to(precise(value.device)) for value in values.values()]
        return Metrics(tuple(values), torch.stack(wide))

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names, self.vector + other.vector)

    def __mul__(self, factor: float) -> Metrics:
        return Metrics(self.names, self.vector * factor)

    def named(self, vector: Tensor) -> dict[str, float]:
        """The numbers of a vector of this layout."""
        return dict(zip(self.names, vector.tolist(), strict=True))


def addressed_noise(shape: Shape, seed: int, step: int, indices: Sequence[int], device: torch.device) -> Noise:
    """The noise of some of a step's images: a function of (stream, draw)."""
    return lambda stream, draw: rng.normal(shape, seed, stream, step, indices, draw).to(device)


def accumulate(
    problem: Problem,
    batch: Batch,
    shape: Shape,
    seed: int,
    step: int,
    total: int,
    micro: int,
    sampling: int | None,
    loss_scale: float = 1.0,
) -> Metrics:
    """Adds the gradient of this process's share of a step to the trained parameters.

    batch: the share. shape: (c, h, w) of one image's latents. total: the global batch size, which the loss is a mean
    over. micro, sampling: images per pass with and without gradient. loss_scale: a factor during the backward pass,
    which keeps gradients in float16's range; the trained parameters' gradients come without it, and must be empty
    before where it is not 1. Returns this share's part of the step's means, so
    that summing over processes completes them.
    """
    window = plan(problem.objective, len(problem.schedule), seed, step)
    device = problem.model.device

    def noise_of(rows: slice) -> Noise:
        return addressed_noise(shape, seed, step, batch.indices[rows], device)

    conditioning = problem.model.encode(batch.prompts)
    with problem.model.folded() if window.first > 0 else nullcontext():
        starts = [
            prefix(problem, conditioning.rows(rows), noise_of(rows), window)
            for rows in chunks(len(batch), sampling or SAMPLING_BATCH)
        ]
    start = Rollout.concatenate(starts)
    metrics: Metrics | None = None
    for rows in chunks(len(batch), micro):
        with rng.samples(seed, step, batch.indices[rows]):  # whose dropout is drawn
            part = loss(problem, start.rows(rows), window, conditioning.rows(rows), batch.prompts[rows], noise_of(rows))
        share = (rows.stop - rows.start) / total
        (part.value * (share * loss_scale)).backward()
        new = _metrics(part, share)
        metrics = new if metrics is None else metrics + new
    assert metrics is not None
    unscale(problem, loss_scale)
    return metrics


def unscale(problem: Problem, loss_scale: float) -> None:
    """Takes the factor of the backward passes out of the trained parameters' gradients."""
    if loss_scale != 1:
        for parameter in problem.model.trainable().values():
            if parameter.grad is not None:
                parameter.grad /= loss_scale


def saturated(images: Tensor) -> Tensor:
    """Which fraction of each image's values lies at the ends of [0, 1]. images: (b, 3, H, W). Returns (b,)."""
    return ((images <= 0) | (images >= 1)).flatten(1).to(precise(images.device)).mean(1)


def precise(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs lack float64


def _metrics(part: Loss, share: float) -> Metrics:
    values: dict[str, Tensor] = {
        "loss": part.value.detach(),
        "reward": part.scores.total.mean(),
        **{f"reward/{name}": scores.mean() for name, scores in part.scores.parts.items()},
        "kl": part.kl,
        "clipped_fraction": saturated(part.images).mean(),
    }
    return Metrics.of(values) * share
