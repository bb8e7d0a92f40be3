"""What a step takes in memory, part by part: the code of training, run on tensors that have shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from draftplus.config import Config
from draftplus.data.batches import Batch
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.objectives import plan_around
from draftplus.diffusion.problem import Problem, StepPlan
from draftplus.diffusion.sampler import Rollout, sample
from draftplus.distributed import World
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.planning.meter import META, Meter, counting, storages
from draftplus.planning.optimizer import eight_bit_moments
from draftplus.planning.subject import Subject, networks_by_part, tensors_of
from draftplus.training.ddpo import ddpo_step
from draftplus.training.placement import Replicated
from draftplus.training.state import State, initial_state
from draftplus.training.step import Setup, precisely, tail
from draftplus.training.update import update
from draftplus.types import Scorer, Scores

MOST_GRADED = 4  # steps of a window that are taken; what each further one adds is that of the last of these


@dataclass(frozen=True)
class Memory:
    """Bytes, of one process.

    weights: by part. trained: "gradients", "optimizer", "average". kept: what the backward pass of a micro-batch keeps,
    by part, with the weights that the KL term widens. phases: the most that is held at once, by phase, all in all.
    fixed: what is held in every phase of a step. folded: of "sampling", the weights with adapters in them. lazy:
    whether text encoders are gone before the denoiser comes.
    """

    weights: Mapping[str, int]
    trained: Mapping[str, int]
    kept: Mapping[str, int]
    phases: Mapping[str, int]
    images: Mapping[str, int] = field(default_factory=dict)
    fixed: int = 0
    folded: int = 0
    lazy: bool = False

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])


class _Imagined(World):
    """One of several processes, whose sums are its own."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def measure(run: Subject, micro: int, share: int, prompt: str, ranks: int = 1) -> Memory:
    """What one process of `ranks` needs, whose share of a step is `share` images, in micro-batches of `micro`.

    prompt: that of all images.
    """
    config, model = run.config, run.model
    tuned: Any = model.tuned
    networks = networks_by_part(run)
    weights = {part: storages(found) for part, found in networks.items()}
    parameters = tuned.trainable()
    adapters = sum(one.nbytes for one in parameters.values()) if tuned.frozen is None else 0
    weights["denoiser"] -= adapters
    if adapters:
        weights["adapters"] = adapters
    batch = min(share, config.train.sampling_batch_size or _sampling_batch(config, micro))
    setup = _setup(run, micro, micro, prompt, ranks)
    planned = setup.plan(0)
    with counting() as meter:
        base = meter.hold(tensors_of(networks))
        state = initial_state(parameters, replace(config.optim, name=_without_content(config.optim.name)))
        average = meter.now - base
        waiting = _waiting(run, setup, planned, share)
        sampling, folded = _sampling(meter, run.problem, setup, planned, batch)
        decoding = _evaluating(meter, run.problem, setup, micro)
        gradients = sum(parameter.nbytes for parameter in parameters.values())
        temporary, before = 0, meter.now
        kept: dict[str, int] = {}
        if METHODS[config.objective.method].differentiates:
            above, kept = _stepping(meter, run.problem, setup, planned, share > micro)
            full = meter.restart()
            update(state, config.optim, {"loss": 1.0})
            optimizer = meter.now - before
            temporary = max(0, meter.peak - full - optimizer)
        else:
            above = _policy_gradient(meter, setup, state)
            optimizer = meter.now - before
            above -= optimizer
    if config.optim.name == "adamw_8bit":
        optimizer = eight_bit_moments(parameters.values())
    copies = gradients if ranks > 1 else 0  # gradients are summed in one flat tensor
    trained = {"gradients": gradients, "optimizer": optimizer, "average": average}
    fixed = sum(weights.values()) - _away(run, weights) + optimizer + average
    resting = fixed - (weights["autoencoder"] + weights["rewards"] if offloads(config) else 0)
    phases = {
        "embedding prompts": weights["text encoders"] + weights["autoencoder"] + (0 if _lazy(run) else fixed),
        "sampling": resting + waiting + sampling,
        "evaluation": fixed + decoding,
        "step": fixed + waiting + above,
        "update": fixed + gradients + max(temporary, copies),
    }
    images = {"micro": micro, "sampling": batch, "share": share}
    return Memory(weights, trained, kept, phases, images, fixed, folded, _lazy(run))


def _without_content(optimizer: str) -> str:
    """One whose update can be made of shapes alone, and takes no less beside its state."""
    return "adamw" if optimizer == "adamw_8bit" else optimizer


def _waiting(run: Subject, setup: Setup, planned: StepPlan, share: int) -> int:
    """What is held of all images of a share while some are worked on: embeddings, latents, and the prefix cache."""
    config, given = setup.config, run.model.encode([*setup.prompts])
    latents = math.prod(setup.shape) * torch.float32.itemsize
    if METHODS[config.objective.method].differentiates:
        stops = 1 + (planned.window.first > 0) + len(planned.keep)
    else:
        stops = 1 + len(setup.problem.sampler.schedule)
    reuse = config.train.prefix_cache
    cached = reuse.batches * (2 + len(planned.keep)) * latents if reuse.uses > 1 else 0
    return share * (given.nbytes + stops * latents + cached)


def offloads(config: Config) -> bool:
    """Whether networks leave the device while they are not needed."""
    return config.model.offload and config.device != "cpu"


def _lazy(run: Subject) -> bool:
    """Whether text encoders are gone before the denoiser comes."""
    return bool(getattr(getattr(run.model, "kind", None), "large_encoders", False))


def _away(run: Subject, weights: Mapping[str, int]) -> int:
    """The weights that are not on the device in a step."""
    return weights["text encoders"] if _lazy(run) or offloads(run.config) else 0


def _sampling_batch(config: Config, micro: int) -> int:
    return SAMPLING_BATCH if METHODS[config.objective.method].differentiates else micro


def _setup(run: Subject, micro: int, images: int, prompt: str, ranks: int) -> Setup:
    config = run.config
    train = replace(config.train, global_batch_size=images * ranks, micro_batch_size=micro)
    config = replace(config, train=train, data=replace(config.data, images_per_prompt=1))
    here = _Imagined(0, ranks, META)
    shape = run.model.latent_shape(config.sampler.height, config.sampler.width)
    return Setup(config, run.problem, [prompt], shape, micro, here, Replicated(here))


def _sampling(meter: Meter, problem: Problem, setup: Setup, planned: StepPlan, images: int) -> tuple[int, int]:
    """What a step of the denoiser without gradient takes over `images`, and how much of it is folded weights."""
    folds = planned.window.first > problem.sampler.gate and METHODS[setup.config.objective.method].differentiates
    conditioning = problem.model.encode([*setup.prompts] * images)
    latents = torch.empty(images, *setup.shape, device=META)
    before = meter.restart()
    with torch.no_grad(), problem.model.tuned.folded() if folds else nullcontext():
        folded = meter.now - before
        sample(problem.sampler.denoiser(conditioning), Rollout(latents), problem.sampler.schedule,
               problem.sampler.solver, begin=0, end=1, noise=lambda _: torch.empty_like(latents))  # fmt: skip
    return meter.peak - before, folded


@torch.no_grad()
def _evaluating(meter: Meter, problem: Problem, setup: Setup, images: int) -> int:
    """What decoding and scoring of `images` takes where no gradient is needed."""
    latents = torch.empty(images, *setup.shape, device=META)
    before = meter.restart()
    problem.scorer(problem.model.decode(latents), [*setup.prompts] * images)
    return meter.peak - before


def _stepping(
    meter: Meter, problem: Problem, setup: Setup, planned: StepPlan, again: bool
) -> tuple[int, dict[str, int]]:
    """The most that a micro-batch takes from its window on, and what its backward pass keeps.

    again: whether gradients of earlier micro-batches are there.
    """
    steps = planned.window.steps
    if len(steps) <= MOST_GRADED:
        return _tail(meter, problem, setup, planned, again)
    fewer, kept = _tail(meter, problem, setup, _shortened(problem, planned, MOST_GRADED - 1), again)
    more, most = _tail(meter, problem, setup, _shortened(problem, planned, MOST_GRADED), again)
    rest = len(steps) - MOST_GRADED
    return more + rest * (more - fewer), {part: most[part] + rest * (most[part] - kept[part]) for part in most}


def _shortened(problem: Problem, planned: StepPlan, steps: int) -> StepPlan:
    window = replace(planned.window, steps=planned.window.steps[-steps:])
    return plan_around(window, problem.objective, problem.sampler.schedule)


def _tail(meter: Meter, problem: Problem, setup: Setup, planned: StepPlan, again: bool) -> tuple[int, dict[str, int]]:
    images, at = setup.micro, dict[str, int]()
    share: Batch[str] = Batch([*setup.prompts] * images, list(range(images)))
    conditioning = problem.model.encode(share.prompts)
    drawn = torch.empty(images, *setup.shape, device=META)
    start = Rollout(drawn, torch.empty_like(drawn) if planned.window.first else None)
    start.kept.update({step: drawn for step in planned.keep if step < planned.window.first})
    setup = replace(setup, problem=replace(problem, scorer=_Marked(meter, problem.scorer, at)))
    parameters = problem.model.tuned.trainable().values()
    for parameter in parameters:
        parameter.grad = None
    before = meter.restart()
    for parameter in parameters if again else ():
        parameter.grad = torch.zeros_like(parameter)
    held = meter.now
    with precisely(setup, planned):
        widened = meter.now - held
        with _decoding(meter, problem.model, at):
            tail(setup, 0, planned, start, share, conditioning)
    base = held + widened
    kept = {
        "window": at["window"] - base, "decode": at["decode"] - at["window"], "reward": at["reward"] - at["decode"],
        "widened weights": widened,
    }  # fmt: skip
    return meter.peak - before, kept


@dataclass(frozen=True)
class _Marked:
    """A problem's scorer, after whose first scores it is noted what is held."""

    meter: Meter
    scorer: Scorer
    at: dict[str, int]
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        scores = self.scorer(images, prompts)
        self.at.setdefault("reward", self.meter.now)
        return scores


@contextmanager
def _decoding(meter: Meter, model: Any, at: dict[str, int]) -> Iterator[None]:
    """Inside, it is noted what is held before and after images are first decoded."""
    decode = model.decode

    def decoded(latents: Tensor) -> Tensor:
        at.setdefault("window", meter.now)
        images: Tensor = decode(latents)
        at.setdefault("decode", meter.now)
        return images

    model.decode = decoded
    try:
        yield
    finally:
        del model.decode


def _policy_gradient(meter: Meter, setup: Setup, state: State) -> int:
    before = meter.restart()
    ddpo_step(setup, state, nullcontext)
    return meter.peak - before
