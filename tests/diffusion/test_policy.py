"""The clipped surrogate, advantages in closed form, and which steps have a probability."""

from __future__ import annotations

import math

import pytest
import torch

from draftplus.config.objective import DdpoConfig
from draftplus.diffusion.policy import normalized_advantages, surrogate
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import random_steps
from tests.tiny import SCHEDULER

CLIP = 0.1
BATCH_ONLY = DdpoConfig(history=None, adv_clip=100)


@pytest.mark.parametrize("advantage", [2.0, -3.0])
@pytest.mark.parametrize("ratio", [0.5, 0.95, 1.0, 1.05, 1.5])
def test_gradient_ends_where_the_ratio_has_moved_far_enough(advantage: float, ratio: float) -> None:
    """To the side that the advantage asks for; on the other side it always pulls back."""
    ratios = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value = surrogate(ratios, torch.tensor([advantage], dtype=torch.float64), CLIP)
    (slope,) = torch.autograd.grad(value.sum(), ratios)
    done = ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP
    assert slope.item() == pytest.approx(0.0 if done else -advantage)
    limit = 1 + CLIP if advantage > 0 else 1 - CLIP
    assert value.item() == pytest.approx(-advantage * (limit if done else ratio))


def test_without_a_history_the_batch_is_the_measure() -> None:
    advantages, history = normalized_advantages([1.0, 2.0, 3.0, 6.0], ["a", "b", "a", "c"], {"a": [9.0]}, BATCH_ONLY)
    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    assert advantages.tolist() == pytest.approx([(r - 3) / deviation for r in (1, 2, 3, 6)], rel=1e-5)
    assert history == {"a": [9.0]}


def test_a_prompt_with_enough_rewards_is_measured_by_its_own() -> None:
    settings = DdpoConfig(history=4, min_history=3, adv_clip=100)
    rewards, prompts = [1.0, 10.0, 3.0, 20.0], ["a", "b", "a", "b"]
    advantages, history = normalized_advantages(rewards, prompts, {"a": [-1.0, 5.0, 7.0], "c": [0.5]}, settings)
    a, b = [5.0, 7.0, 1.0, 3.0], rewards  # the latest four of a; of b there are two, so the batch serves
    for row, known in ((0, a), (2, a), (1, b), (3, b)):
        mean = sum(known) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in known) / 4)
        assert advantages[row].item() == pytest.approx((rewards[row] - mean) / deviation, rel=1e-5)
    assert history == {"a": a, "b": [10.0, 20.0], "c": [0.5]}


def test_all_of_a_batch_count_however_short_the_history() -> None:
    """So that the advantages of a prompt whose images are all of this batch sum to zero."""
    settings = DdpoConfig(history=2, min_history=2, adv_clip=100)
    advantages, history = normalized_advantages([1.0, 2.0, 6.0], ["a"] * 3, {"a": [50.0]}, settings)
    assert advantages.sum().item() == pytest.approx(0, abs=1e-9)
    assert history == {"a": [2.0, 6.0]}


def test_prompts_of_different_scale_get_advantages_of_the_same_size() -> None:
    settings = DdpoConfig(history=4, min_history=2)
    rewards = [1.0, 2.0, 3.0, 1001.0, 1002.0, 1003.0]
    own, _ = normalized_advantages(rewards, ["a"] * 3 + ["b"] * 3, {}, settings)
    assert own[:3].tolist() == pytest.approx(own[3:].tolist())
    together, _ = normalized_advantages(rewards, ["a"] * 3 + ["b"] * 3, {}, BATCH_ONLY)
    assert (together[:3] < 0).all() and (together[3:] > 0).all()


def test_advantages_are_clipped_on_both_sides() -> None:
    rewards = [0.0] * 30 + [1.0, -1.0]
    advantages, _ = normalized_advantages(rewards, ["a"] * 32, {}, DdpoConfig(history=None, adv_clip=2.5))
    assert advantages[-2:].tolist() == [2.5, -2.5] and not advantages[:-2].any()


def test_equal_rewards_teach_nothing() -> None:
    for settings in (BATCH_ONLY, DdpoConfig(history=2, min_history=2)):
        advantages, _ = normalized_advantages([0.1, 0.1, 0.1], ["a"] * 3, {}, settings)
        assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_not_finite_are_not_remembered(bad: float) -> None:
    before = {"a": [1.0, 2.0]}
    advantages, history = normalized_advantages([1.0, bad], ["a", "b"], before, DdpoConfig())
    assert advantages.isnan().all() and history == before == {"a": [1.0, 2.0]}


def test_steps_without_variance_are_left_out() -> None:
    noisy = make_schedule(SCHEDULER, 5)[0]  # ends at a level with a little noise, as Stable Diffusion does
    assert random_steps(noisy, 1.0) == [0, 1, 2, 3, 4]
    assert random_steps(noisy, 0.0) == []
    assert random_steps(make_schedule({**SCHEDULER, "set_alpha_to_one": True}, 5)[0], 0.5) == [0, 1, 2, 3]
