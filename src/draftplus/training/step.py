"""One step of the gradient methods: an inference prefix in large batches, then the tail in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from draftplus import rng
from draftplus.config import Config
from draftplus.data.batches import Batch, batch
from draftplus.diffusion.objectives import Loss, gated, kept_loss, loss, plan, prefix
from draftplus.diffusion.overflow import Watch, check_decoded
from draftplus.diffusion.problem import Noise, Problem, StepPlan
from draftplus.diffusion.sampler import Rollout, sample
from draftplus.distributed import World, sent
from draftplus.errors import UserError, needs_memory
from draftplus.evaluation.chunks import SAMPLING_BATCH, chunks
from draftplus.runs.rows import reward_key
from draftplus.training.placement import Placement
from draftplus.training.reuse import PrefixCache, source, uses
from draftplus.training.state import State
from draftplus.training.task import Abandonable
from draftplus.training.update import update
from draftplus.types import Conditioning

Shape = tuple[int, int, int]
FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class Setup:
    """What all steps of a run have in common.

    prompts: those to train on. shape: (c, h, w) of one image's latents. micro: images per backward pass. cache: of what
    the frozen model draws; None where each start noise is used once.
    """

    config: Config
    problem: Problem
    prompts: Sequence[str]
    shape: Shape
    micro: int
    here: World
    placement: Placement
    cache: PrefixCache | None = None

    def source(self, step: int) -> int:
        """The number of the batch of prompts and start noises that a step uses."""
        return source(self.config.train.prefix_cache, step, self.config.seed)

    def plan(self, step: int) -> StepPlan:
        """What a step does, the same on every rank."""
        return plan(self.problem.objective, self.problem.sampler.schedule, self.config.seed, step)

    def looked_at(self, number: int) -> frozenset[int]:
        """The steps without gradient that a penalty looks at in any use of a batch of start noises."""
        steps = uses(self.config.train.prefix_cache, number, self.config.seed)
        return frozenset(at for step in steps for at in self.plan(step).keep)

    def share(self, step: int) -> Batch[str]:
        """This process's images of a step."""
        size, per_prompt = self.config.train.global_batch_size, self.config.data.images_per_prompt
        return batch(
            self.prompts, self.source(step), self.config.seed, size, per_prompt, self.here.rank, self.here.size
        )

    def noise(self, step: int, indices: Sequence[int]) -> Noise:
        """The noise of some of a step's images, by their places in the batch."""
        device, first, gate = self.problem.model.device, self.source(step), self.problem.sampler.gate

        def draw(stream: str, number: int) -> Tensor:
            before = stream == "x_T" or (stream == "solver" and number < gate)
            drawn = rng.normal(self.shape, self.config.seed, stream, first if before else step, indices, number)
            return sent(drawn, device)

        return draw

    @property
    def loss_scale(self) -> float:
        """A factor during the backward pass, which keeps gradients in float16's range."""
        return FLOAT16_LOSS_SCALE if self.config.model.dtype == "float16" else 1.0

    def complete(self, metrics: Metrics) -> dict[str, float]:
        """Sums gradients, without the loss scale, and metrics over all processes. Returns the metrics by name."""
        parameters = list(self.problem.model.tuned.trainable().values())
        if self.loss_scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad /= self.loss_scale
        return metrics.named(self.placement.reduce(parameters, metrics.vector))


def gradient_step(setup: Setup, state: State, abandonable: Abandonable) -> dict[str, float]:
    """One step of any method but DDPO, which is one update of the weights. Returns its means, by name."""
    with abandonable():
        means = setup.complete(accumulate(setup, state.step))
    objective = setup.config.objective
    learns = objective.method != "refl" or objective.refl.hinge is None  # all rewards may be beyond the hinge
    return {**means, "grad_norm": update(state, setup.config.optim, means, learns)}


@dataclass(frozen=True)
class Metrics:
    """Means over an optimizer step's images, and the names that `vector` lists them by."""

    names: tuple[str, ...]
    vector: Tensor

    @staticmethod
    def of(values: Mapping[str, Tensor]) -> Metrics:
        """Scalars by name, or tensors of one shape."""
        wide = [value.to(precise(value.device)) for value in values.values()]
        return Metrics(tuple(values), torch.stack(wide))

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics(self.names, self.vector + other.vector)

    def plus(self, values: Mapping[str, Tensor]) -> Metrics:
        """With these scalars added to those of their names."""
        zero = torch.zeros((), device=self.vector.device)
        return self + Metrics.of({name: values.get(name, zero) for name in self.names})

    def __mul__(self, factor: float) -> Metrics:
        return Metrics(self.names, self.vector * factor)

    def named(self, vector: Tensor) -> dict[str, float]:
        """The numbers of a vector of this layout."""
        return dict(zip(self.names, vector.tolist(), strict=True))


def accumulate(setup: Setup, step: int) -> Metrics:
    """Adds the gradient of this process's share of a step, times the loss scale, to the trained parameters.

    Returns this share's part of the step's means, so that summing over processes completes them.
    """
    problem, sizes = setup.problem, setup.config.train
    share = setup.share(step)
    planned = setup.plan(step)
    conditioning = problem.model.encode(share.prompts)
    parts = [
        (rows, conditioning.rows(rows), setup.noise(step, share.indices[rows]))
        for rows in chunks(len(share), sizes.sampling_batch_size or SAMPLING_BATCH)
    ]
    begun: Rollout | None = None
    if setup.cache is not None:
        number = setup.source(step)

        def draw() -> Rollout:
            keep = setup.looked_at(number)
            return Rollout.concatenate([gated(problem, given, noise, keep) for _, given, noise in parts])

        begun = setup.cache.get(number, draw)
        begun = replace(begun, kept={at: latents for at, latents in begun.kept.items() if at in planned.keep})
    with problem.model.tuned.folded() if planned.window.first > problem.sampler.gate else nullcontext():
        starts = [
            prefix(problem, given, noise, planned, None if begun is None else begun.rows(rows))
            for rows, given, noise in parts
        ]
    start = Rollout.concatenate(starts)
    with precisely(setup, planned):
        return tail(setup, step, planned, start, share, conditioning)


@contextmanager
def precisely(setup: Setup, planned: StepPlan) -> Iterator[None]:
    """Around the passes that a penalty compares, and their backward passes.

    In half precision two predictions differ by rounding even where the models hardly do: at Stable Diffusion 1.5's size
    and guidance 7.5 that is more than a trained adapter's whole distance. So they are made in float32, and without
    TF32, the default of convolutions on recent GPUs, which rounds as float16 does.
    """
    if not planned.looks:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with setup.problem.model.tuned.widened():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def tail(
    setup: Setup, step: int, planned: StepPlan, start: Rollout, share: Batch[str], conditioning: Conditioning
) -> Metrics:
    """What `accumulate` does from the window on. start: of all of this process's share, whose `conditioning` it is."""
    problem, sizes, seed = setup.problem, setup.config.train, setup.config.seed
    metrics: Metrics | None = None
    for rows in chunks(len(share), setup.micro):
        part_of_step = (rows.stop - rows.start) / sizes.global_batch_size
        noise = setup.noise(step, share.indices[rows])
        with setup.placement.micro_batch(last=rows.stop == len(share)):
            with rng.samples(seed, step, share.indices[rows]):  # whose dropout is drawn
                part = loss(problem, start.rows(rows), planned, conditioning.rows(rows), share.prompts[rows], noise)
            backward(part.value * (part_of_step * setup.loss_scale), rows)
            new = _metrics(part)
            for at in part.kept:
                more = kept_loss(problem, planned, part, at, conditioning.rows(rows))
                backward(more.value * (part_of_step * setup.loss_scale), rows)
                new = new.plus({"loss": more.value.detach(), **more.penalties})
        new = new * part_of_step
        metrics = new if metrics is None else metrics + new
    assert metrics is not None
    return metrics


def backward(loss: Tensor, rows: slice) -> None:
    with needs_memory(f"the backward pass of {rows.stop - rows.start} images"):
        loss.backward()


@torch.no_grad()
def what_overflowed(setup: Setup, step: int) -> str | None:
    """Which part of making this process's images of a step overflowed, and where; None where nothing does."""
    problem, sampler, share = setup.problem, setup.problem.sampler, setup.share(step)
    conditioning = problem.model.encode(share.prompts)
    for rows in chunks(len(share), setup.micro):
        noise, watch = setup.noise(step, share.indices[rows]), Watch()
        denoise = watch.over(sampler.drawing(conditioning.rows(rows)))
        start, fresh = sampler.start(noise("x_T", 0)), partial(noise, "solver")
        latents = sample(denoise, start, sampler.schedule, sampler.solver, noise=fresh).latents
        try:
            watch.check(latents, len(sampler.schedule), problem.model)
            check_decoded(problem.model.decode(latents), problem.model)
        except UserError as error:
            return str(error)
    return None


def saturated(images: Tensor) -> Tensor:
    """Which fraction of each image's values lies at the ends of [0, 1], NaN where some are not finite.

    images: (b, 3, H, W). Returns (b,).
    """
    flat = images.detach().flatten(1)
    ends = ((flat <= 0) | (flat >= 1)).to(precise(images.device)).mean(1)
    return ends.where(flat.isfinite().all(1), torch.nan)


def precise(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs lack float64


def _metrics(part: Loss) -> Metrics:
    return Metrics.of(
        {
            "loss": part.value.detach(),
            "reward": part.scores.total.mean(),
            **{reward_key(name): scores.mean() for name, scores in part.scores.parts.items()},
            **part.penalties,
            "clipped_fraction": saturated(part.images).mean(),
        }
    )
