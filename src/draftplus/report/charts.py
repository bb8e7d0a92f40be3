"""Line charts as inline SVG, drawn by matplotlib and coloured by the page's style sheet.

The drawing uses placeholder colours that become CSS variables, so that one chart reads on light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from draftplus.report import paper

# placeholder colour -> CSS variable; values that no chart would use
INK, GRID, FAINT, LINE, MARK, TEXT, PAGE = (f"#0102{i:02x}" for i in range(3, 10))
SERIES = tuple(f"#0103{i:02x}" for i in range(10))
VARIABLES = {INK: "--muted", GRID: "--grid", FAINT: "--line-faint", LINE: "--line", MARK: "--mark", TEXT: "--ink",
             PAGE: "--page", **{colour: f"--s{i}" for i, colour in enumerate(SERIES)}}  # fmt: skip

LEAST_SPAN = 0.05  # of the values themselves

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a prompt may have a $
    "svg.hashsalt": "draftplus",
    "font.family": paper.families(),
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Chart:
    """One curve over optimizer steps, or over what `axis` says.

    values: NaN and infinity leave a gap. errors: half-lengths of error bars. smoothed: a second, bolder curve over
    the same steps. level: a dashed horizontal line, with its label. markers: dots at the points. from_zero: the axis
    starts at 0, so that heights compare. best: the step of the best evaluation, a star. stopped: the step at which a
    guard ended the run, a cross.
    """

    title: str
    note: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    smoothed: Sequence[float] | None = None
    level: tuple[float, str] | None = None
    markers: bool = False
    from_zero: bool = False
    best: int | None = None
    stopped: int | None = None
    axis: str = "optimizer step"


def draw(chart: Chart, prefix: str) -> str:
    """The chart as an <svg> element. prefix: makes its ids unique in the page."""
    values = np.where(np.isfinite(chart.values), chart.values, np.nan)
    marker = "o" if chart.markers or len(values) == 1 else None
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.12, 0.2, 0.865, 0.75))
        raw = FAINT if chart.smoothed is not None else LINE
        axes.plot(chart.steps, values, color=raw, linewidth=1.2 if chart.smoothed is not None else 2, marker=marker)
        if chart.smoothed is not None:
            axes.plot(chart.steps, chart.smoothed, color=LINE, linewidth=2.2)
        if chart.errors is not None:
            axes.errorbar(chart.steps, values, chart.errors, fmt="none", ecolor=LINE, elinewidth=1.2, capsize=3)
        for step, sign in ((chart.best, "*"), (chart.stopped, "x")):
            if step is not None and step in chart.steps:
                at = values[list(chart.steps).index(step)]
                size, edge = (13, 0) if sign == "*" else (9, 2)
                axes.plot(step, at, sign, color=MARK, markersize=size, markeredgewidth=edge, zorder=5)
        if chart.level is not None:
            height, label = chart.level
            axes.axhline(height, color=MARK, linewidth=1.3, linestyle=(0, (4, 3)))
            axes.annotate(
                label, (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                ha="right", va="bottom", color=MARK,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.02, y=0.12)
        widen(axes)
        if chart.from_zero:
            axes.set_ylim(0, 1.2 * float(np.nanmax(values)) or 1)
        axes.set_xlabel(chart.axis)
        axes.spines["left"].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return inline(buffer.getvalue(), prefix, chart.title)


def widen(axes: Axes, which: str = "y") -> None:
    """Axes that span 5% of their values at least, so that a difference of a thousandth does not look like a step."""
    for axis in which:
        low, high = getattr(axes, f"get_{axis}lim")()
        least = LEAST_SPAN * max(abs(low), abs(high))
        if high - low < least:
            middle = (low + high) / 2
            getattr(axes, f"set_{axis}lim")(middle - least / 2, middle + least / 2)


def inline(svg: str, prefix: str, title: str) -> str:
    """Matplotlib's SVG document as an element of an HTML page: its own ids, the page's colours, any width."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', body)
    assert view is not None
    opening = f'<svg {view[0]} role="img" aria-label="{escape(title)}">'
    body = re.sub(r"<svg[^>]*>", lambda _: opening, body, count=1)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'xlink:href="#', f'href="#{prefix}-', body)
    body = body.replace("url(#", f"url(#{prefix}-")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return body.strip()
