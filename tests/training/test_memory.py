"""What a step holds for its backward passes, and what a cache keeps, do not grow with what the KL term looks at."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draftplus.config import Config, ObjectiveConfig
from draftplus.config.schema import PrefixCacheConfig, TrainConfig
from draftplus.diffusion.sampler import Rollout
from draftplus.distributed import World
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.training.placement import Replicated
from draftplus.training.reuse import PrefixCache, uses
from draftplus.training.step import Setup, accumulate
from tests.support.steps import ANIMALS
from tests.tiny import CPU, SHAPE, problem

TRAJECTORY = ObjectiveConfig("draft", 1, 0.5, kl_steps="trajectory", kl_prefix_coeff=3.0)
BATCH, MICRO = 4, 2


class Held:
    """A tensor that waits for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Graphs:
    """The bytes that autograd holds for backward passes: now, at most, and all that it ever held."""

    def __init__(self) -> None:
        self.now = self.peak = self.ever = 0

    def pack(self, tensor: Tensor) -> Held:
        held, size = Held(tensor), tensor.numel() * tensor.element_size()
        self.now += size
        self.ever += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._let_go, size)
        return held

    def _let_go(self, size: int) -> None:
        self.now -= size


def setup_of(
    model: StableDiffusion, objective: ObjectiveConfig, steps: int, reuse: PrefixCacheConfig | None = None
) -> Setup:
    reuse = reuse or PrefixCacheConfig()
    train = TrainConfig(global_batch_size=BATCH, prefix_cache=reuse)
    here = World(0, 1, CPU)
    cache = PrefixCache(reuse.batches) if reuse.uses > 1 else None
    made = problem(model, objective, steps=steps)
    return Setup(Config(objective=objective, train=train), made, ANIMALS, SHAPE, MICRO, here, Replicated(here), cache)


def graphs_of(setup: Setup, steps: int = 2) -> Graphs:
    seen = Graphs()
    with torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda held: held.tensor):
        for step in range(steps):
            accumulate(setup, step)
    assert seen.now == 0, "graphs are left over"
    return seen


@pytest.mark.parametrize("window", [0.5, 0.0], ids=["window", "prefix alone"])
def test_graphs_do_not_grow_with_draws_or_sampling_steps(model: StableDiffusion, window: float) -> None:
    objective = replace(TRAJECTORY, kl_coeff=window)
    plain = graphs_of(setup_of(model, replace(objective, kl_steps="window"), 10))
    one = graphs_of(setup_of(model, objective, 10))
    many = graphs_of(setup_of(model, replace(objective, kl_draws=8), 10))
    longer = graphs_of(setup_of(model, replace(objective, kl_draws=8), 30))
    assert plain.ever < one.ever < many.ever == longer.ever, "each draw has a pass with gradient"
    assert plain.peak == one.peak == many.peak == longer.peak


def test_graphs_do_not_grow_under_a_gate(model: StableDiffusion) -> None:
    reuse = PrefixCacheConfig(uses=2, batches=1)
    plain = graphs_of(setup_of(model, replace(TRAJECTORY, kl_steps="window"), 10))
    for total, draws in ((10, 1), (10, 8), (30, 8)):
        setup = setup_of(model, replace(TRAJECTORY, gate=0.5, kl_draws=draws), total, reuse)
        assert graphs_of(setup).peak == plain.peak


@pytest.mark.parametrize(("total", "draws"), [(10, 1), (40, 1), (40, 3)])
def test_a_cache_keeps_the_latents_that_its_uses_look_at(model: StableDiffusion, total: int, draws: int) -> None:
    """Beside those at the gate; so their number is bounded, however many sampling steps there are."""
    reuse = PrefixCacheConfig(uses=3, batches=2)
    setup = setup_of(model, replace(TRAJECTORY, gate=0.5, kl_draws=draws), total, reuse)
    begun: dict[int, Rollout] = {}
    for step in range(4):
        accumulate(setup, step)
        assert setup.cache is not None
        begun |= setup.cache._known
    assert begun.keys() == {0, 1}
    for number, rollout in begun.items():
        looks = {at for step in uses(reuse, number, 0) for at in setup.plan(step).keep if at < total // 2}
        assert rollout.kept.keys() == looks and len(looks) <= reuse.uses * draws
    assert any(rollout.kept for rollout in begun.values())
