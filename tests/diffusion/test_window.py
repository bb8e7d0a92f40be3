"""Which steps carry gradient, for each method of the family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from draftplus.config import ObjectiveConfig
from draftplus.diffusion import window as windows
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.window import Window
from tests.tiny import SCHEDULER


def planned(objective: ObjectiveConfig, total: int, seed: int, step: int) -> Window:
    return plan(objective, make_schedule(SCHEDULER, total)[0], seed, step).window


def objective(method: str, grad_steps: Any = 1) -> ObjectiveConfig:
    return ObjectiveConfig(method, grad_steps)


@pytest.mark.parametrize(("k", "steps"), [(1, (9,)), (3, (7, 8, 9)), (10, tuple(range(10))), ("all", tuple(range(10)))])
def test_draft(k: Any, steps: tuple[int, ...]) -> None:
    assert planned(objective("draft", k), 10, 0, 0) == Window(steps)


def test_draft_lv_trains_the_last_step() -> None:
    assert planned(objective("draft_lv"), 10, 0, 0) == Window((9,))


def test_refl_draws_one_late_step() -> None:
    chosen = objective("refl")
    chosen.refl.first = 0.75
    drawn = [planned(chosen, 40, 0, step) for step in range(400)]
    assert all(w.steps == (w.x0_at,) and not w.detach_inputs for w in drawn)
    counts = Counter(w.first for w in drawn)
    assert set(counts) == set(range(30, 40)) and max(counts.values()) < 3 * min(counts.values())


def test_refl_of_few_steps() -> None:
    chosen = objective("refl")
    chosen.refl.first = 0.99
    assert {planned(chosen, 3, 0, step).first for step in range(20)} == {2}
    assert planned(chosen, 1, 0, 0) == Window((0,), x0_at=0)


def test_alignprop_draws_the_length() -> None:
    chosen = objective("alignprop")
    chosen.alignprop.min_steps, chosen.alignprop.max_steps = 2, 5
    drawn = {planned(chosen, 10, 0, step) for step in range(100)}
    assert drawn == {windows.last(k, 10) for k in (2, 3, 4, 5)}
    chosen.alignprop.max_steps = None
    assert {len(planned(chosen, 10, 0, step).steps) for step in range(300)} == set(range(2, 11))


@pytest.mark.parametrize(("total", "k"), [(10, 2), (10, 3), (10, 10), (7, 3), (50, 5), (5, 1)])
def test_drtune_spaces_the_steps_evenly(total: int, k: int) -> None:
    drawn = {planned(objective("drtune", k), total, 0, step) for step in range(200)}
    stride = total // k
    for window in drawn:
        assert len(window.steps) == k and window.detach_inputs and window.x0_at is None
        assert all(b - a == stride for a, b in zip(window.steps, window.steps[1:], strict=False))
        assert window.steps[0] >= 0 and window.steps[-1] < total
    # over the training the last stretches are covered evenly: every step of them is trained at some time
    assert {step for window in drawn for step in window.steps} == set(range(total - k * stride, total))


def test_drtune_stops_early() -> None:
    chosen = objective("drtune", 3)
    chosen.drtune.early_stop = 4
    drawn = [planned(chosen, 12, 0, step) for step in range(300)]
    ends = Counter(11 if w.x0_at is None else w.x0_at for w in drawn)
    assert set(ends) == {7, 8, 9, 10, 11} and min(ends.values()) > 30
    for window in drawn:
        assert window.steps and (window.x0_at is None or window.steps[-1] <= window.x0_at)


def test_drtune_always_trains_a_step() -> None:
    chosen = objective("drtune", 1)
    chosen.drtune.early_stop = 4
    for step in range(100):
        window = planned(chosen, 5, 0, step)
        assert len(window.steps) == 1 and window.steps[0] <= (4 if window.x0_at is None else window.x0_at)


@pytest.mark.parametrize("method", ["refl", "alignprop", "drtune"])
def test_a_random_window_depends_on_seed_and_step_alone(method: str) -> None:
    chosen = objective(method, 2 if method == "drtune" else 1)
    first = [planned(chosen, 20, 3, step) for step in range(30)]
    assert first == [planned(chosen, 20, 3, step) for step in reversed(range(30))][::-1]
    assert first != [planned(chosen, 20, 4, step) for step in range(30)]
    assert len(set(first)) > 1
