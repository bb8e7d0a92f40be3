"""The figure of docs/results.md: what settings keep as they gain, and how much more than the two rivals keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.curves import Compared, Curve, each_seed, gains
from benchmarks.study.reading import Study
from benchmarks.study.tables import GAINS, MANY, Rival, against, percent_at, rivals
from draftplus.report.looks import MARKERS, ON_PAPER

FINE = 100  # points of a line
BESIDE = 0.032  # of the gain, between marks that stand side by side


def draw(made: Study, target: Path) -> None:
    """Writes the figure, in the form that the name of the file says."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure_of(made).savefig(target, dpi=130, facecolor=ON_PAPER.page)


def figure_of(made: Study) -> Figure:
    """The settings of `made.plan.drawn`: what they keep as they gain, and beside it, how much more than the rivals."""
    curves = [made.curves[name] for name in made.plan.drawn if name in made.curves]
    if not curves:
        raise SystemExit("none of the settings that the plan names under `drawn` is finished")
    looks = {curve.label: (ON_PAPER.series[i], MARKERS[i]) for i, curve in enumerate(curves)}
    figure = Figure(figsize=(11, 5.6))
    FigureCanvasAgg(figure)
    compared = [rival for rival in rivals(made) if rival.label.endswith(", stopped early")]
    grid = figure.add_gridspec(
        max(1, len(compared)), 2, width_ratios=(1.25, 1), wspace=0.2, hspace=0.42, left=0.06, right=0.99, top=0.93,
        bottom=0.27,
    )  # fmt: skip
    whole = figure.add_subplot(grid[:, 0])
    for curve in curves:
        _line(whole, made, curve, *looks[curve.label], "-")
    for number, curve in enumerate(made.knobs.values()):
        _line(whole, made, curve, ON_PAPER.muted, " ", (":", "--")[number % 2])
    whole.plot(0, 100, "*", markersize=13, color=ON_PAPER.text, zorder=5)
    whole.annotate("base model", (0, 100), xytext=(8, 7), textcoords="offset points", color=ON_PAPER.text)
    whole.margins(0.05, 0.09)
    _dress(whole, "diversity at equal gain", "LPIPS, % of the base model's")
    for row, rival in enumerate(compared):
        axes = figure.add_subplot(grid[row, 1])
        others = [curve for curve in curves if curve is not rival.at(GAINS[0])]
        _differences(axes, made, others, rival, looks)
        _dress(axes, f"less {rival.label}", "LPIPS, difference")
    whole.set_xlabel("gain in held-out reward")
    figure.axes[-1].set_xlabel("gain in held-out reward")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.05, 0.01), ncols=3, frameon=False, fontsize=10)
    for axes in figure.axes:
        axes.tick_params(colors=ON_PAPER.muted)
    return figure


def _line(axes: Axes, made: Study, curve: Curve, colour: str, marker: str, line: str) -> None:
    """What a setting keeps where it has gained so much for the first time, by the mean of its seeds."""
    drawn = each_seed(1, len(made.prompts))
    whole = Curve(curve.label, (0,), tuple({k: v.mean(0, keepdims=True) for k, v in p.items()} for p in curve.points),
                  curve.from_base)  # fmt: skip
    reached = gains(whole, made.base, made.plan.reward, drawn)[:, 0]
    along = np.linspace(1e-3, float(reached.max()), FINE)
    kept = [percent_at(made, float(gain))(whole, drawn)[0] for gain in along]
    label = f"{curve.label} ({len(curve.seeds)} seeds)"
    axes.plot(along, kept, line, color=colour, linewidth=2 if line == "-" else 1.4, label=label, zorder=2)
    tops = np.maximum.accumulate(reached)
    at = [float(gain) for gain, top in zip(reached, tops, strict=True) if gain == top]  # evaluations on the line
    axes.plot(at, [percent_at(made, gain)(whole, drawn)[0] for gain in at], marker, color=colour, markersize=5)


def _differences(
    axes: Axes, made: Study, curves: Sequence[Curve], rival: Rival, looks: dict[str, tuple[str, str]]
) -> None:
    """The difference from a rival at each gain that half of the seeds reach with both, with its interval."""
    axes.axhline(0, color=ON_PAPER.text, linewidth=1)
    for number, curve in enumerate(curves):
        colour, marker = looks[curve.label]
        for gain in GAINS:
            told = against(made, curve, rival, gain)
            if not _shown(told):
                continue
            one, at = told.difference, gain + BESIDE * (number - (len(curves) - 1) / 2)
            assert one is not None
            proven = one.low > 0 or one.high < 0
            axes.plot([at, at], [one.low, one.high], color=colour, linewidth=2.6 if proven else 1.2)
            axes.plot(at, one.value, marker, color=colour, markersize=6)
    axes.set_xticks(GAINS)
    axes.set_xlim(GAINS[0] - 0.13, GAINS[-1] + 0.13)


def _shown(told: Compared) -> bool:
    return told.difference is not None and told.reached >= MANY * told.seeds


def _dress(axes: Axes, title: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=ON_PAPER.text)
    axes.set_ylabel(up, color=ON_PAPER.muted)
    axes.xaxis.label.set_color(ON_PAPER.muted)
    axes.grid(True, color=ON_PAPER.grid, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_color(ON_PAPER.grid)
