"""Diversity at equal gain in reward, with intervals over training seeds and prompts.

A setting is a curve from the base model through what it gained and kept at each evaluation. Between two evaluations it
is a line. Where it has gained so much *for the first time* decides what it keeps there, so a curve that comes back to
the same gain later has no second choice.

An interval holds 95% of a bootstrap over training seeds and prompts together: n - 1 of the n of each are drawn with
replacement (Rao and Wu 1988), and everything is computed again from the means of what was drawn. Two settings are
compared in the seeds that both have, with the same draws for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
OVER = ("both", "seeds", "prompts")  # what an interval is over

Array = NDArray[Any]
Measures = Mapping[str, Array]  # by name: (seeds, prompts)


@dataclass(frozen=True)
class Curve:
    """A setting at several points, from the base model's outwards, which is not among them.

    seeds: the training seeds, ascending. points: of each, what was measured. from_base: whether it begins at the base
    model. A line over settings whose first one gains a lot does not: a straight way there from the base model, which
    cuts off the bend of what lies between, would make a rival weaker than it is.
    """

    label: str
    seeds: tuple[int, ...]
    points: tuple[Measures, ...]
    from_base: bool = True

    def of(self, seeds: Sequence[int]) -> Curve:
        """The same with some of its seeds only."""
        rows = [self.seeds.index(seed) for seed in seeds]
        points = tuple({name: values[rows] for name, values in point.items()} for point in self.points)
        return replace(self, seeds=tuple(seeds), points=points)

    def at(self, index: int) -> Curve:
        """One of its points alone."""
        return replace(self, points=(self.points[index],))


@dataclass(frozen=True)
class Draws:
    """How often each seed and prompt was drawn: (draws, seeds) and (draws, prompts). The first draw is all of them."""

    seeds: Array
    prompts: Array

    def mean(self, values: Array) -> Array:
        """The means of (seeds, prompts) over what was drawn, (draws,); of one row, the same for all seeds."""
        seeds = self.seeds if len(values) > 1 else np.ones((len(self.seeds), 1))
        sums = ((seeds @ values) * self.prompts).sum(1)
        means: Array = sums / seeds.sum(1) / self.prompts.sum(1)
        return means


@lru_cache(maxsize=64)
def bootstrap(seeds: int, prompts: int, draws: int = DRAWS, over: str = "both") -> Draws:
    """Everything, and then what is drawn. over: one of OVER; what it does not name is all there in every draw."""
    generator = np.random.default_rng(0)

    def counts(n: int, drawn: bool) -> Array:
        numbers = generator.integers(0, n, (draws, max(1, n - 1)))
        counted = (numbers[:, :, None] == np.arange(n)).sum(1)
        return np.vstack([np.ones(n), counted if drawn else np.ones((draws, n))])

    return Draws(counts(seeds, over != "prompts"), counts(prompts, over != "seeds"))


def each_seed(seeds: int, prompts: int) -> Draws:
    """One seed after another, with all prompts."""
    return Draws(np.eye(seeds), np.ones((seeds, prompts)))


def gains(curve: Curve, base: Measures, reward: str, drawn: Draws) -> Array:
    """What each point has gained over the base model: (points, draws)."""
    return np.stack([drawn.mean(point[reward]) - drawn.mean(base[reward]) for point in curve.points])


def at_gain(curve: Curve, gain: Array | float, base: Measures, reward: str, name: str, drawn: Draws) -> Array:
    """A measure where a curve has gained so much for the first time: (draws,), NaN where it never does.

    gain: above 0; one for all draws, or one of each.
    """
    gained = gains(curve, base, reward, drawn)  # (points, draws)
    values = np.stack([drawn.mean(point[name]) for point in curve.points])
    if curve.from_base:
        gained = np.vstack([np.zeros((1, len(drawn.seeds))), gained])
        values = np.vstack([drawn.mean(base[name])[None], values])
    found = np.full(len(drawn.seeds), np.nan)
    for g0, g1, v0, v1 in zip(gained[:-1], gained[1:], values[:-1], values[1:], strict=True):
        crossed = np.isnan(found) & (g0 < gain) & (gain <= g1)
        share = (gain - g0) / np.where(g1 > g0, g1 - g0, 1)
        found = np.where(crossed, v0 + share * (v1 - v0), found)
    return found


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, and in which share of the draws there was a number. None: no number at all."""

    value: float
    low: float
    high: float
    share: float

    def told(self, digits: int = 1, sign: bool = True) -> str:
        """As a table has it."""
        plus = "+" if sign else ""
        value, low, high = (f"{one:{plus}.{digits}f}".replace("-", "−") for one in (self.value, self.low, self.high))
        often = "" if self.share > 0.995 else f"; in {100 * self.share:.0f}% of draws"
        return f"{value} ({low} to {high}{often})"


def estimate(values: Array) -> Estimate | None:
    """Of a value for each draw, the first of which is everything; None where that has none."""
    others = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(others):
        return None
    low, high = np.quantile(others, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high), len(others) / (len(values) - 1))


@dataclass(frozen=True)
class Compared:
    """A difference of two curves. holds: in how many of the `reached` seeds it is above 0; of `seeds` that both have.

    draws: of each draw.
    """

    difference: Estimate | None
    holds: int
    reached: int
    seeds: int

    def told(self, digits: int = 1) -> str:
        """As a table has it."""
        if self.difference is None:
            return "–" if not self.seeds else f"– (both in {self.reached} of {self.seeds} seeds)"
        return f"{self.difference.told(digits)}; {self.holds} of {self.reached} seeds"


Difference = Callable[[Curve, Curve, Draws], Array]  # of two curves, for each draw


def difference_of(value: Callable[[Curve, Draws], Array]) -> Difference:
    """The difference of something that each curve has by itself."""
    return lambda ours, rival, drawn: value(ours, drawn) - value(rival, drawn)


def compared(ours: Curve, rival: Curve, difference: Difference, prompts: int, over: str = "both") -> Compared:
    """The difference of two curves in the seeds that both have, paired. over: one of OVER."""
    seeds = sorted(set(ours.seeds) & set(rival.seeds))
    if not seeds:
        return Compared(None, 0, 0, 0)
    a, b = ours.of(seeds), rival.of(seeds)
    alone = difference(a, b, each_seed(len(seeds), prompts))
    reached = alone[~np.isnan(alone)]
    told = estimate(difference(a, b, bootstrap(len(seeds), prompts, over=over)))
    return Compared(told, int((reached > 0).sum()), len(reached), len(seeds))


def joined(label: str, curves: Sequence[Curve]) -> Curve:
    """The last points of several curves as one, which begins at the first of them, in the seeds that all have."""
    seeds = sorted(set.intersection(*(set(curve.seeds) for curve in curves)))
    return Curve(label, tuple(seeds), tuple(curve.of(seeds).points[-1] for curve in curves), from_base=False)


def scatter(values: Array) -> float:
    """The standard deviation over seeds; NaN of fewer than two."""
    kept = values[~np.isnan(values)]
    return float(kept.std(ddof=1)) if len(kept) > 1 else float("nan")
