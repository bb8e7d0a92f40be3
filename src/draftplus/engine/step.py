"""The gradient of one optimizer step: an inference prefix in large batches, then the tail in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from draftplus import rng
from draftplus.data.batches import Batch
from draftplus.diffusion.objectives import Loss, Noise, Problem, loss, plan, prefix
from draftplus.diffusion.sampler import Rollout

Shape = tuple[int, int, int]
SAMPLING_BATCH = 16  # images per pass without gradient, unless train.sampling_batch_size says otherwise


@dataclass(frozen=True)
class Metrics:
    """Means over an optimizer step's images, and the names that `vector` lists them by."""

    names: tuple[str, ...]
    vector: Tensor

    def named(self, vector: Tensor) -> dict[str, float]:
        """The numbers of a vector of this layout."""
        return dict(zip(self.names, vector.tolist(), strict=True))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length)."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


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
        part = loss(problem, start.rows(rows), window, conditioning.rows(rows), batch.prompts[rows], noise_of(rows))
        share = (rows.stop - rows.start) / total
        (part.value * (share * loss_scale)).backward()
        new = _metrics(part, share)
        metrics = new if metrics is None else Metrics(new.names, metrics.vector + new.vector)
    assert metrics is not None
    if loss_scale != 1:
        for parameter in problem.model.trainable().values():
            if parameter.grad is not None:
                parameter.grad /= loss_scale
    return metrics


def _metrics(part: Loss, share: float) -> Metrics:
    precise = torch.float32 if part.images.device.type == "mps" else torch.float64  # Apple's GPUs lack float64
    saturated = ((part.images <= 0) | (part.images >= 1)).to(precise).mean()
    values: dict[str, Tensor] = {
        "loss": part.value.detach(),
        "reward": part.scores.total.mean(),
        **{f"reward/{name}": scores.mean() for name, scores in part.scores.parts.items()},
        "kl": part.kl,
        "clipped_fraction": saturated,
    }
    return Metrics(tuple(values), torch.stack([value.to(precise) for value in values.values()]) * share)
