"""The figures of a comparison: the trade-off, both sides of it against the KL coefficient, and training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from draftplus.report import charts
from draftplus.report.drawing import DASHES, Drawing, Numbering, figure_name
from draftplus.report.grouping import Mean
from draftplus.report.looks import ON_PAGE, Ink, Look
from draftplus.report.points import EVALUATED, FINAL, Figures, Point, Series
from draftplus.report.rings import rings


def trade_off(figures: Figures, reward: str, looks: Mapping[str, Look], numbers: Numbering) -> Drawing:
    """Diversity against reward: a line for each method, the base model, and rings around the clear Pareto front.

    On the page every mark has a ring, of which its script shows those that belong to what is switched on.
    """

    def paint(axes: Axes, ink: Ink) -> None:
        ringed = rings(figures.shown(), reward).marks if ink is not ON_PAGE else figures.points()
        for series in figures.series:
            if ink is ON_PAGE or series.shown:
                _line(axes, ink, looks[series.name], numbers, series, lambda p: p.reward(reward), lambda p: p.lpips)
        for point in ringed:
            if (at := point.reward(reward)) is not None:
                axes.plot(
                    at.value, point.lpips.value, "o", markersize=12, markerfacecolor="none", markeredgecolor=ink.text,
                    markeredgewidth=0.9, alpha=0.55, gid=numbers.ring(point), zorder=1.5,
                )  # fmt: skip
        axes.grid(True, axis="both")
        axes.set_xlabel(f"held-out reward, {reward} (higher is better)")
        axes.set_ylabel("diversity, mean pairwise LPIPS")
        axes.margins(0.06, 0.08)
        most = 7 if axes.bbox.width > axes.bbox.height * 1.3 else 4  # of a narrow page
        axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        for point in figures.base:
            _base_mark(axes, ink, numbers, point, reward)
        charts.widen(axes, "xy")
        _name_coefficients(axes, ink, numbers, figures, reward)

    legend = {series.name: looks[series.name] for series in figures.series if series.shown}
    name = "trade-off" if len(figures.rewards) == 1 else f"trade-off-{figure_name(reward)}"
    title = f"Diversity against reward ({reward})"
    return Drawing(name, title, paint, legend, (8.6, 4.7), (4.6, 4.5), reward=reward)


def _name_coefficients(axes: Axes, ink: Ink, numbers: Numbering, figures: Figures, reward: str) -> None:
    """The KL coefficient beside each mark of a line over several, on the side that is freest of other marks."""
    drawn = [(at.value, p.lpips.value) for p in figures.shown() if (at := p.reward(reward)) is not None]
    marks = axes.transData.transform(drawn)
    figure = axes.figure
    scale = figure.dpi / 72  # pixels of a point
    for series in figures.series:
        if series.kind != FINAL or len(series.points) < 2:
            continue
        for point in series.points:
            at = point.reward(reward)
            if at is None:
                continue
            here = axes.transData.transform((at.value, point.lpips.value))
            others = marks[np.hypot(*(marks - here).T) > 0.5]

            def room(side: tuple[int, int], here: np.ndarray = here, others: np.ndarray = others) -> float:
                middle = here + scale * np.array([26 * side[0], 11 * side[1]])
                return float(np.min(np.hypot(*((others - middle) / scale * [0.5, 1]).T), initial=20))

            right, up = max(((1, 1), (-1, -1), (1, -1), (-1, 1)), key=room)
            axes.annotate(
                f"{point.symbol} = {point.x:g}", (at.value, point.lpips.value), xytext=(8 * right, 6 * up),
                fontsize=8.5, textcoords="offset points", color=ink.muted, zorder=6,
                gid=f"line-{numbers.series[series.name]}", ha="left" if right > 0 else "right",
                va="bottom" if up > 0 else "top",
            )  # fmt: skip


def _base_mark(axes: Axes, ink: Ink, numbers: Numbering, point: Point, reward: str) -> None:
    """A star for the base model, named on the side where there is room."""
    at = point.reward(reward)
    if at is None:
        return
    x, y = at.value, point.lpips.value
    axes.plot(x, y, "*", markersize=15, color=ink.text, markeredgecolor=ink.page, zorder=5, gid=numbers.mark(point))
    left, right = axes.get_xlim()
    side = 1 if x < left + 0.7 * (right - left) else -1
    axes.annotate(
        point.label, (x, y), xytext=(10 * side, 6), textcoords="offset points", color=ink.text,
        ha="left" if side > 0 else "right",
    )  # fmt: skip


def _line(
    axes: Axes, ink: Ink, look: Look, numbers: Numbering, series: Series, across: Callable[[Point], Mean | None],
    up: Callable[[Point], Mean | None],
) -> None:  # fmt: skip
    """A line through the series' path, its own points marked, with error bars over seeds."""
    colour, gid = ink.series[look.colour], f"line-{numbers.series[series.name]}"
    path = [(x.value, y.value) for p in series.path() if (x := across(p)) is not None and (y := up(p)) is not None]
    if len(path) > 1 and series.kind != EVALUATED:
        axes.plot(
            *zip(*path, strict=True), color=colour, linewidth=1.3 if look.dashed else 2.2, zorder=2, gid=gid,
            linestyle=DASHES if look.dashed else "-", alpha=0.85,
        )  # fmt: skip
    for point in series.points:
        if (x := across(point)) is not None and (y := up(point)) is not None:
            _mark(axes, ink, look, numbers, gid, point, x, y)


def _mark(
    axes: Axes, ink: Ink, look: Look, numbers: Numbering, gid: str, point: Point, x: Mean, y: Mean
) -> None:  # fmt: skip
    """A point with its error bars, which belong to the line `gid`."""
    colour = ink.series[look.colour]
    if x.error or y.error:
        bar = axes.errorbar(
            x.value, y.value, y.error or None, x.error or None, fmt="none", ecolor=colour, elinewidth=1.1, alpha=0.7
        )
        for artist in bar.get_children():
            artist.set_gid(gid)
    axes.plot(
        x.value, y.value, look.marker, markersize=5 if look.hollow else 7.5, color=colour, zorder=4,
        markerfacecolor=ink.page if look.hollow else colour, gid=numbers.mark(point),
        markeredgecolor=colour if look.hollow else ink.page, markeredgewidth=1.2 if look.hollow else 0.8,
    )  # fmt: skip


def against_kl(figures: Figures, reward: str | None, looks: Mapping[str, Look], numbers: Numbering) -> Drawing | None:
    """Diversity (reward None) or a reward against the KL coefficient, 0 included; None with fewer than two of them."""
    lines = [s for s in figures.series if s.kind == FINAL and any(p.x > 0 for p in s.points)]

    def over(series: Series, point: Point) -> float:
        return 0.0 if point is series.start else point.x

    coefficients = sorted({over(series, point) for series in lines for point in series.path()})
    if len(coefficients) < 2:
        return None
    place = _places(coefficients)
    starts = {series.start.series for series in lines if series.start is not None}
    without = "DRaFT" if all(name.startswith("DRaFT-") for name in starts) else "the method without"

    def across(series: Series, point: Point) -> Mean:
        return Mean(place[over(series, point)])

    def up(point: Point) -> Mean | None:
        return point.lpips if reward is None else point.reward(reward)

    def paint(axes: Axes, ink: Ink) -> None:
        for series in lines:
            _line(axes, ink, looks[series.name], numbers, series, partial(across, series), up)
            if series.start is not None and (at := up(series.start)) is not None:
                start = series.start
                own, gid = looks[start.series], f"line-{numbers.series[start.series]}"
                _mark(axes, ink, own, numbers, gid, start, Mean(place[0.0]), at)
        for point in figures.base:
            if (at := up(point)) is not None:
                axes.axhline(at.value, color=ink.text, linewidth=1.1, linestyle=DASHES, zorder=1)
                axes.annotate(
                    point.label, (0.01 if reward is None else 0.99, at.value), xycoords=("axes fraction", "data"),
                    xytext=(0, 4), textcoords="offset points", color=ink.text,
                    ha="left" if reward is None else "right",
                )  # fmt: skip
        shown = coefficients if len(coefficients) <= 9 else coefficients[:: -(-len(coefficients) // 9)]
        axes.set_xticks([place[one] for one in shown], [f"{one:g}" for one in shown])
        symbols = " or ".join(sorted({point.symbol for series in lines for point in series.points}))
        axes.set_xlabel(f"KL coefficient {symbols}{f' (logarithmic; 0 is {without})' if 0 in place else ''}")
        axes.set_ylabel("diversity, mean LPIPS" if reward is None else f"held-out reward, {reward}")
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        axes.margins(0.05, 0.14)
        charts.widen(axes)

    several = len(figures.rewards) > 1 and reward is not None
    name = "diversity-kl" if reward is None else f"reward-kl-{figure_name(reward)}" if several else "reward-kl"
    title = (
        "Diversity against the KL coefficient" if reward is None else f"Reward ({reward}) against the KL coefficient"
    )
    return Drawing(name, title, paint, {series.name: looks[series.name] for series in lines})


def _places(coefficients: Sequence[float]) -> dict[float, float]:
    """Where each coefficient stands: by its logarithm, and 0 as far from the smallest as they are apart."""
    positive = [one for one in coefficients if one > 0]
    logs = [math.log10(one) for one in positive]
    gap = (logs[-1] - logs[0]) / (len(logs) - 1) if len(logs) > 1 else 1.0
    return {one: math.log10(one) if one > 0 else logs[0] - gap for one in coefficients}


@dataclass(frozen=True)
class Curve:
    """One run's curve. series: the method that it is coloured by. flags: (step, value, marker) of best and stopped."""

    run: int
    series: str
    steps: Sequence[int]
    values: Sequence[float]
    marked: bool
    flags: Sequence[tuple[int, float, str]] = ()


def training(name: str, title: str, unit: str, curves: Sequence[Curve], looks: Mapping[str, Look],
             numbers: Mapping[str, int]) -> Drawing:  # fmt: skip
    """The curves of all runs over optimizer steps, coloured by method."""

    def paint(axes: Axes, ink: Ink) -> None:
        width = 1.7 if len(curves) <= 12 else 1.1
        for curve in curves:
            colour, series = ink.series[looks[curve.series].colour], numbers[curve.series]
            marker = looks[curve.series].marker if curve.marked and len(curves) <= 12 else None
            axes.plot(
                curve.steps, curve.values, color=colour, linewidth=width, alpha=0.8, gid=f"run-{curve.run}-{series}",
                marker=marker or ("o" if len(curve.steps) == 1 else None), markersize=4,
            )  # fmt: skip
            for step, value, flag in curve.flags:
                axes.plot(
                    step, value, flag, markersize=9 if flag == "*" else 8, color=colour, zorder=5,
                    markeredgecolor=ink.page if flag == "*" else ink.text, markeredgewidth=0.7 if flag == "*" else 1.8,
                    gid=f"flag-{curve.run}-{series}",
                )  # fmt: skip
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        axes.margins(0.02, 0.08)
        charts.widen(axes)

    shown = dict.fromkeys(curve.series for curve in curves)
    return Drawing(f"training-{name}", title, paint, {series: looks[series] for series in shown}, (4.6, 2.7))


def thinned(values: Sequence[Any], most: int) -> np.ndarray:
    """The places of at most `most` values, evenly spaced, the last included."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
