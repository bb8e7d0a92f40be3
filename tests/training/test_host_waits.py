"""Between its begin and its end, a step never has the host wait for the device.

Networks lie on the meta device, whose tensors have no content: what asks for it raises an error. What is copied there
from the CPU must go by `sent`, which on a GPU does not wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import gpu
from benchmarks.floor import training
from benchmarks.shapes import SHAPES, build
from draftplus.config import Config, ObjectiveConfig
from draftplus.diffusion.policy import Trajectory, rollout
from draftplus.distributed import constant, sent
from draftplus.rewards.clip import load_emoji_clip
from draftplus.rewards.dissimilarity import Dissimilarity
from draftplus.training.ddpo import Experience, accumulate_update
from draftplus.training.step import Setup, accumulate
from tests.support.steps import OBJECTIVES, SAMPLERS

META = torch.device("meta")
COPYING = {"aten::_to_copy", "aten::copy_"}
ONCE = (sent, constant)  # the latter makes each of its tensors once
FACTORIES = (torch.tensor, torch.as_tensor, torch.asarray)
READING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
QUICK = ("draft", "trajectory")
DIFFERENTIATING = [name for name in OBJECTIVES if not name.startswith("ddpo")]


class Watch(TorchDispatchMode):
    """Notes what a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        given = [x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = META in given or any(x.device == META for x in tree_leaves(made) if isinstance(x, Tensor))
        copied = name in COPYING and torch.device("cpu") in given
        indexed = name.startswith("aten::index") and torch.device("cpu") in given
        if there and (copied or indexed or name in READING) and not _inside(*ONCE):
            self.waits.append(f"{name} of {given} at {_place()}")
        return made


class Making(TorchFunctionMode):
    """Notes tensors that are made of Python's numbers on the device, which torch does on the CPU first."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        numbers = func is Tensor.new_tensor or (func in FACTORIES and not isinstance(args[0], Tensor))
        looked_up = func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list)
        numbers = numbers or (looked_up and args[0].device == META)
        if numbers and (looked_up or made.device == META) and not _inside(*ONCE):
            self.waits.append(f"{func.__name__} at {_place()}")
        return made


def _frames() -> Any:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _inside(*functions: Any) -> bool:
    codes = [getattr(function, "__wrapped__", function).__code__ for function in functions]
    return any(frame.f_code in codes for frame in _frames())


def _place() -> str:
    frames = [f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in _frames()]
    return next((place for place in frames if "torch" not in place and __file__ not in place), frames[0])


def waits(work: Callable[[], Any]) -> list[str]:
    with Watch() as watch, Making(watch.waits):
        work()
    return watch.waits


def test_what_is_noticed() -> None:
    there = torch.zeros(3, device=META)
    assert len(waits(lambda: torch.tensor(1.0, device=META))) == 1
    assert len(waits(lambda: there.new_tensor([1.0]))) == 1
    assert len(waits(lambda: torch.zeros(3).to(META))) == 1
    assert len(waits(lambda: there.copy_(torch.zeros(3)))) == 1
    assert len(waits(lambda: there[torch.tensor([0, 1])])) == 1
    assert len(waits(lambda: there[[0, 1]])) == 1
    assert not waits(lambda: sent(torch.zeros(3), META))
    assert not waits(lambda: torch.full((), 2.0, device=META) + there.to(torch.float64)[:2].sum())
    with pytest.raises(RuntimeError):
        float(there.sum())
    with pytest.raises(RuntimeError):
        bool(there.isfinite().all())


@lru_cache
def networks(name: str, dtype: torch.dtype) -> tuple[Config, Any, Any]:
    shape = gpu.tiny(SHAPES[name])
    config = gpu.settings(shape, 64, 2, steps=4)
    reward: Any = load_emoji_clip(dropout=0.1)
    reward.model.to(META)
    return config, build(shape, config.model.lora, META, dtype), reward


def prepared(name: str, objective: ObjectiveConfig, dtype: torch.dtype = torch.float32, **sampler: Any) -> Setup:
    """A tiny model of a family, and a CLIP reward, on the meta device."""
    config, model, reward = networks(name, dtype)
    config = replace(config, objective=objective, sampler=replace(config.sampler, **sampler))
    setup, _ = training(config, model, {"pickscore": reward})
    prompts = [f"prompt {number}" for number in range(8)]
    model.encode([*prompts, config.sampler.negative_prompt])
    return replace(setup, prompts=prompts)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in DIFFERENTIATING]
)
def test_a_step_of_each_method(name: str) -> None:
    setup = prepared("sd15", OBJECTIVES[name], **SAMPLERS.get(name, {}))
    assert waits(lambda: accumulate(setup, 0)) == []


@pytest.mark.parametrize("name", ["sdxl", "sd35m", "flux1"])
def test_a_step_of_each_family(name: str) -> None:
    objective = ObjectiveConfig("draft", 1, 0.5, kl_space="noise")
    setup = prepared(name, objective, torch.bfloat16)
    assert waits(lambda: accumulate(setup, 0)) == []


def test_an_update_of_ddpo() -> None:
    """After its rewards were read, which advantages are made of."""
    setup = prepared("sd15", OBJECTIVES["ddpo"], **SAMPLERS["ddpo"])

    def update(step: int) -> None:
        share, planned = setup.share(step), setup.plan(step)
        conditioning = setup.problem.model.encode(share.prompts)
        with torch.no_grad():
            trajectory = Trajectory.concatenate(
                [rollout(setup.problem, conditioning, setup.noise(step, share.indices))]
            )
        made = Experience(conditioning, trajectory, share.indices, [])
        accumulate_update(setup, made, planned, slice(0, len(share)), torch.ones(len(share)))

    assert waits(lambda: update(0)) == []


def test_a_reward_that_compares_images() -> None:
    reward = Dissimilarity(lambda images: images.flatten(1), same_prompt=True)
    images = torch.zeros(4, 3, 8, 8, device=META)
    assert waits(lambda: reward(images, ["a", "a", "b", "b"])) == []
