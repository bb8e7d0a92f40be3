"""A mark is ringed where it can be said, in spite of the errors over seeds, that no other beats it in both."""

import itertools
import math

import numpy as np
import pytest

from draftplus.report.grouping import Mean
from draftplus.report.points import BASE, Point, pareto
from draftplus.report.rings import NOTES, numbers_of, ring_note, rings

R = "emoji_clip"


def mark(reward: float, lpips: float, *errors: float, series: str = "DRaFT-1") -> Point:
    of_reward, of_lpips = errors or (None, None)
    return Point(series, f"{reward}", {R: Mean(reward, of_reward)}, Mean(lpips, of_lpips))


def test_single_runs_have_no_ring():
    """Two runs at 10.75, of which one was ringed as the best."""
    marks = [mark(10.75, 0.3500), mark(10.7512, 0.3501)]
    found = rings(marks, R)
    assert (found.marks, found.unknown, found.close) == ([], 1, 0) and ring_note(found) == NOTES["unknown"]
    with_base = rings([mark(10.7, 0.36, series=BASE), *marks], R)
    assert with_base.marks == [] and with_base.unknown == 1


def test_differences_below_their_errors_have_no_ring():
    close = [mark(10.75, 0.35, 0.1, 0.01), mark(10.8, 0.351, 0.1, 0.01)]
    found = rings(close, R)
    assert (found.marks, found.unknown, found.close) == ([], 0, 1) and ring_note(found) == NOTES["close"]
    apart = [mark(10.75, 0.35, 0.1, 0.01), mark(10.9, 0.355, 0.1, 0.01)]
    assert rings(apart, R).marks == [apart[1]] and ring_note(rings(apart, R)) == ""
    assert rings([apart[0], mark(10.88, 0.355, 0.1, 0.01)], R).marks == []  # 0.13 < 0.1 sqrt 2


def test_the_base_model_has_no_error_over_training_seeds():
    base = mark(10.0, 0.36, series=BASE)
    tuned = mark(11.0, 0.30, 0.1, 0.01)
    assert rings([base, tuned], R).marks == [base, tuned]


def test_beside_a_single_run_the_largest_error_is_assumed():
    sure = mark(12.0, 0.30, 0.1, 0.01)
    assert rings([sure, mark(11.5, 0.29)], R).marks == [sure]
    assert rings([sure, mark(11.9, 0.295)], R).marks == []


def test_ringed_marks_are_of_the_front_and_clear():
    draw = np.random.default_rng(0)
    for _ in range(50):
        marks = [mark(*draw.normal([10, 0.3], [1, 0.05]), *abs(draw.normal(0, [0.3, 0.02]))) for _ in range(8)]
        found = rings(marks, R)
        front = pareto(marks, R)
        assert len(found.marks) + found.close == len(front) and found.unknown == 0
        for one, other in itertools.permutations(marks, 2):
            gaps = (one.rewards[R].value - other.rewards[R].value, one.lpips.value - other.lpips.value)
            errors = ((one.rewards[R].error, other.rewards[R].error), (one.lpips.error, other.lpips.error))
            if one in found.marks:
                assert any(gap > math.hypot(*both) for gap, both in zip(gaps, errors, strict=True))
    sharp = [mark(p.rewards[R].value, p.lpips.value, 0.0, 0.0) for p in marks]
    assert rings(sharp, R).marks == pareto(sharp, R)


def test_what_the_script_is_told():
    assert numbers_of(mark(10.0, 0.3, 0.1, 0.01)) == {"rewards": {R: [10.0, 0.1]}, "lpips": [0.3, 0.01]}
    assert numbers_of(mark(10.0, 0.3)) == {"rewards": {R: [10.0, None]}, "lpips": [0.3, None]}
    assert numbers_of(mark(10.0, 0.3, series=BASE)) == {"rewards": {R: [10.0, 0.0]}, "lpips": [0.3, 0.0]}


def test_marks_without_the_reward_are_left_out():
    other = Point("a", "other", {"other": Mean(9.0, 0.1)}, Mean(0.9, 0.1))
    sure = mark(12.0, 0.30, 0.1, 0.01)
    assert rings([other, sure], R).marks == [sure] and pytest.approx(0.9) == other.lpips.value
