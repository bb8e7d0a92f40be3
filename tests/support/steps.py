"""Optimizer steps of the tiny model in float64, for comparisons between ways to cut the batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from draftplus.build import build_model
from draftplus.config import Config, ModelConfig, ObjectiveConfig
from draftplus.config.objective import AlignpropConfig, DdpoConfig, ReflConfig
from draftplus.config.schema import OptimConfig, PrefixCacheConfig, TrainConfig
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.sampler import Rollout
from draftplus.distributed import MEMORY, World, world
from draftplus.distributed.sharding import make_mesh, own, shard, whole
from draftplus.evaluation.held_out_set import EvaluationSet
from draftplus.models import loading
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.rewards.combined import Combined
from draftplus.training import placement as placing
from draftplus.training.fine_tuning import FineTuning
from draftplus.training.placement import Placement, Replicated, Sharded
from draftplus.training.reuse import PrefixCache
from draftplus.training.state import initial_state, tensors_of
from draftplus.training.step import Setup
from draftplus.types import Scores
from tests.tiny import CPU, SHAPE, TinyScorer, problem, randomize, tiny_model

BATCH = 4
ANIMALS = ["a cat", "a dog", "a bee", "a fox", "a pig", "a cow", "a hen"]
OBJECTIVES = {
    "draft": ObjectiveConfig("draft", 2, kl_coeff=0.5),
    "draft_lv": ObjectiveConfig("draft_lv", 1, kl_coeff=0.5),
    "refl": ObjectiveConfig("refl", 1, refl=ReflConfig(hinge=-2.0)),
    "alignprop": ObjectiveConfig("alignprop", 1, alignprop=AlignpropConfig(1, None)),
    "drtune": ObjectiveConfig("drtune", 2, kl_coeff=0.5, kl_space="x0"),
    "trajectory": ObjectiveConfig("draft", 1, 0.5, kl_steps="trajectory", kl_draws=2, kl_prefix_coeff=3.0),
    "gated": ObjectiveConfig("draft", "all", 0.5, kl_steps="trajectory", kl_weights="path", gate=0.5),
    "ddpo-gated": ObjectiveConfig("ddpo", "all", 0.5, kl_steps="trajectory", gate=0.25, ddpo=DdpoConfig(history=None)),
    "noisy": ObjectiveConfig("draft", 2),
    "multistep": ObjectiveConfig("draft", 2),
    "ddpo": ObjectiveConfig("ddpo", "all", ddpo=DdpoConfig(history=3, min_history=2)),
    "ddpo-updates": ObjectiveConfig(
        "ddpo", "all", kl_coeff=0.5, ddpo=DdpoConfig(inner_epochs=2, updates=2, clip=1e-3, history=None)
    ),
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "noisy": {"eta": 1.0}, "multistep": {"solver": "dpmpp_2m"}, "ddpo": {"eta": 1.0}, "ddpo-updates": {"eta": 0.7},
    "gated": {"eta": 0.5}, "ddpo-gated": {"eta": 1.0},
}  # fmt: skip
REUSE = {"gated": PrefixCacheConfig(uses=2, batches=1)}


@dataclass
class Updates:
    """What some steps did.

    update: of all weights, one vector. metrics: by step and name. scores: of each image. scored: each pass's prompts.
    known: whether the cache knew what the frozen model draws, at each step that asked it. held: how many numbers of the
    trained weights, their gradients and the optimizer this process has.
    """

    update: Tensor
    metrics: dict[str, float]
    windows: list[tuple[int, ...]]
    prompts: list[list[str]]
    scores: list[Tensor] = field(default_factory=list)
    scored: list[list[str]] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)


class Watched(PrefixCache):
    """A cache that notes what it knew; without `keeps`, it knows nothing."""

    def __init__(self, batches: int, keeps: bool, known: list[bool]) -> None:
        super().__init__(batches)
        self.keeps, self.known = keeps, known

    def get(self, number: int, draw: Callable[[], Rollout]) -> Rollout:
        drawn: list[Rollout] = []
        found = super().get(number, lambda: drawn.append(draw()) or drawn[0])
        if not self.keeps:
            self._known.clear()
        self.known.append(not drawn)
        return found


def take_steps(
    model: StableDiffusion, objective: ObjectiveConfig, micro: int, sampling: int | None, steps: int = 2, seed: int = 0,
    here: World | None = None, keeps: bool = True, placement: Placement | None = None,
    score: Callable[[Tensor, list[str]], Scores] | None = None,
) -> Updates:  # fmt: skip
    """Steps of AdamW from the model's weights, which are restored afterwards.

    keeps: whether a cache has what it is given. placement: of the model, which is placed already. score: None: by a
    reward without a network.
    """
    here = here or World(0, 1, CPU)
    name = next((name for name, known in OBJECTIVES.items() if known is objective), "")
    made = problem(model, objective, steps=4, **SAMPLERS.get(name, {}))
    scores: list[Tensor] = []
    scored: list[list[str]] = []

    def recording(images: Tensor, prompts: list[str]) -> Scores:
        given = (score or TinyScorer())(images, prompts)
        scores.extend(given.total.detach())
        scored.append(list(prompts))
        return given

    recording.differentiable = True  # type: ignore[attr-defined]
    made = replace(made, scorer=recording)  # type: ignore[arg-type]
    parameters = model.tuned.trainable()
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    config = Config(
        seed=seed, objective=objective, optim=OptimConfig(lr=0.01, grad_clip=0.1),
        train=TrainConfig(
            global_batch_size=BATCH, sampling_batch_size=sampling, prefix_cache=REUSE.get(name, PrefixCacheConfig())
        ),
    )  # fmt: skip
    known: list[bool] = []
    cache = Watched(REUSE[name].batches, keeps, known) if name in REUSE else None
    setup = Setup(config, made, ANIMALS, SHAPE, micro, here, placement or Replicated(here), cache)
    task = FineTuning(setup, {}, Combined({"recording": (recording, 1.0)}), EvaluationSet([], 2), Path(), steps)
    state = initial_state(task.parameters, config.optim)
    result = Updates(torch.empty(0), {}, [], [], scores, scored, known)
    look = lambda optimizer, *_: result.held.update(gradients=_numbers(p.grad for p in parameters.values()))  # noqa: E731
    state.optimizer.register_step_pre_hook(look)
    for step in range(steps):
        means = task.step(state, nullcontext)
        state.step += 1
        result.metrics.update({f"step {step} {key}": value for key, value in means.items()})
        result.windows.append(plan(objective, made.sampler.schedule, seed, step).window.steps)
        result.prompts.append(setup.share(step).prompts)
    result.held |= {name: _numbers(tensors.values()) for name, tensors in tensors_of(state).items()}
    result.update = torch.cat([whole(p.detach() - before[key]).flatten() for key, p in parameters.items()])
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(before[key])
    return result


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(own(tensor).numel() for tensor in tensors)


def take_steps_in_parts(path: str, full: bool, methods: list[str], within: int | None, micro: int) -> None:
    """Methods on this rank, which holds a part of the model; what came out is saved in the working directory."""
    model = tiny_model(Path(path), full=full)
    randomize(model)
    with world("cpu") as here:
        placement = Sharded(here, within)
        placement.place(model)
        held = [_numbers(network.parameters()) for network in model.tuned.networks()]
        made = {
            name: vars(take_steps(model, OBJECTIVES[name], micro, None, here=here, placement=placement))
            for name in methods
        }
    torch.save({"held": held, "made": made}, "updates.pt")


def place_in_turn(path: str, log: str) -> None:
    """A denoiser is read and divided, then rewards; a file is told when this rank begins and ends."""
    read, divide = loading.load_part, placing.shard

    def note(what: str) -> None:
        with open(log, "a") as file:
            file.write(f"{os.environ['RANK']} {what}\n")

    def noted_read(cls: Any, source: loading.Source, name: str, dtype: torch.dtype) -> Any:
        if name == "transformer":
            note("reads")
            time.sleep(0.2)  # in which the others would read, too
        return read(cls, source, name, dtype)

    def noted_divide(*given: Any) -> None:
        divide(*given)
        note("has divided")

    loading.load_part, placing.shard = noted_read, noted_divide
    with world("cpu") as here:
        placement = Sharded(here, None)
        placement.place(build_model(ModelConfig(path), here.device, denoiser_on=MEMORY))
        with placement.loading():
            note("reads rewards")
            time.sleep(0.2)
            note("has placed them")


def write_odd_rows(rows: int) -> None:
    """Weights that the processes cannot divide evenly, gathered and written by one of them."""
    with world("cpu") as here:
        network = torch.nn.Sequential(torch.nn.Linear(2, rows))
        with torch.no_grad():
            network[0].weight.copy_(torch.arange(2.0 * rows).view(rows, 2))
        placement = Sharded(here, None)
        shard(network, [], make_mesh(here, None), here.device)
        gathered = placement.gather(network.state_dict())
        if gathered is not None:
            save_torch_state_dict(gathered, ".", filename_pattern="w{suffix}.safetensors")


def take_steps_on_a_rank(path: str, steps: int) -> None:
    """All methods on this rank; what came out is saved in the working directory."""
    model = tiny_model(Path(path))
    randomize(model)
    with world("cpu") as here:
        made = {
            name: take_steps(model, objective, 1, None, steps=steps, here=here)
            for name, objective in OBJECTIVES.items()
        }
    torch.save({name: vars(updates) for name, updates in made.items()}, "updates.pt")
