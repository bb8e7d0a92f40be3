"""Which marks of a trade-off are ringed as its Pareto front: those of which it can be said in spite of the errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.report.points import BASE, Point, pareto

NOTES = {
    "unknown": "A mark of a single training run has no ring: how far it would move with another seed is unknown. "
    "Train each setting with several seeds, such as seed=0,1,2.",
    "close": "Where two marks are closer to each other than their standard errors, neither has a ring.",
}


@dataclass(frozen=True)
class Rings:
    """The marks of the Pareto front that are ringed, and how many of it are not.

    unknown: marks of a single training run, whose errors nobody knows. close: those that are within the standard errors
    of another mark.
    """

    marks: list[Point]
    unknown: int
    close: int


def rings(points: Sequence[Point], reward: str) -> Rings:
    """The marks of which can be said, in spite of the errors over seeds, that no other beats them in both.

    A mark is clear of another where it is better in one of both by more than one standard error of the difference. Of
    a mark whose error is not known, the largest of the others is assumed where it is compared with. The base model has
    no error over training seeds. comparison.js has the same rule, for the marks that are switched on.
    """
    errors = [{id(point): _error(point, which) for point in points} for which in (reward, None)]
    largest = [max((error for error in told.values() if error), default=math.inf) for told in errors]

    def clear(one: Point, other: Point) -> bool:
        gaps = (_value(one, reward) - _value(other, reward), one.lpips.value - other.lpips.value)
        return any(
            gap > math.hypot(told[id(one)] or 0.0, most if (its := told[id(other)]) is None else its)
            for gap, told, most in zip(gaps, errors, largest, strict=True)
        )

    measured = [point for point in points if math.isfinite(_value(point, reward))]
    front = pareto(points, reward)
    known = [point for point in front if all(told[id(point)] is not None for told in errors)]
    marks = [one for one in known if all(clear(one, other) for other in measured if other is not one)]
    return Rings(marks, len(front) - len(known), len(known) - len(marks))


def _value(point: Point, reward: str) -> float:
    mean = point.reward(reward)
    return math.nan if mean is None else mean.value


def _error(point: Point, reward: str | None) -> float | None:
    """A mark's standard error over seeds of a reward, or of the diversity for None; None where it is not known."""
    mean = point.lpips if reward is None else point.reward(reward)
    return 0.0 if point.series == BASE else None if mean is None else mean.error


def numbers_of(point: Point) -> dict[str, object]:
    """A mark's means and errors, for the page's script."""
    return {
        "rewards": {name: [mean.value, _error(point, name)] for name, mean in point.rewards.items()},
        "lpips": [point.lpips.value, _error(point, None)],
    }


def ring_note(found: Rings) -> str:
    """Why marks of the Pareto front have no ring; empty where all have one. comparison.js says the same."""
    return " ".join([NOTES["unknown"]] * (found.unknown > 0) + [NOTES["close"]] * (found.close > 0))
