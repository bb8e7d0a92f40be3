"""A figure that is drawn once and told twice: in the page, in its colours, and as files for white paper.

What the page's script needs to find is told in the ids of the groups of the SVG: `mark-POINT-SERIES`,
`ring-POINT-SERIES`, `line-SERIES`, `run-RUN-SERIES`, `flag-RUN-SERIES`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from draftplus.report import charts, paper
from draftplus.report.looks import ON_PAGE, ON_PAPER, Ink, Look
from draftplus.report.points import Point

DASHES = (0, (3, 2))


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn in any colours. paint: draws on axes. legend: the series that it shows, by look.

    wide, narrow: sizes in inches, of the file and the page, and of a narrow page; None where one size is for both.
    reward: whose Pareto front is ringed.
    """

    name: str
    title: str
    paint: Callable[[Axes, Ink], None]
    legend: Mapping[str, Look]
    wide: tuple[float, float] = (4.6, 3.0)
    narrow: tuple[float, float] | None = None
    reward: str | None = None

    def element(self, prefix: str) -> str:
        """The figure as <svg> elements for the page, in its colours, each size with a class."""
        sizes = [(self.wide, "wide"), (self.narrow, "narrow")] if self.narrow else [(self.wide, "any")]
        return "".join(
            f'<div class="size-{name}">{self._svg(size, f"{prefix}-{name}")}</div>' for size, name in sizes if size
        )

    def _svg(self, size: tuple[float, float], prefix: str) -> str:
        with rc_context(ON_PAGE.style()):
            figure = Figure(figsize=size)
            self.paint(_axes(figure, size), ON_PAGE)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata=paper.SVG_METADATA)
        svg = charts.inline(buffer.getvalue(), prefix, self.title)
        svg = re.sub(rf'id="{prefix}-mark-(\d+)-(\d+)"', r'class="mark" data-point="\1" data-series="\2"', svg)
        svg = re.sub(rf'id="{prefix}-ring-(\d+)-(\d+)"', r'class="ring off" data-point="\1"', svg)
        svg = re.sub(rf'id="{prefix}-run-(\d+)-(\d+)"', r'class="run" data-run="\1" data-series="\2"', svg)
        svg = re.sub(rf'id="{prefix}-flag-(\d+)-(\d+)"', r'class="flag" data-run="\1" data-series="\2"', svg)
        return re.sub(rf'id="{prefix}-line-(\d+)"', r'data-series="\1"', svg)

    def save(self, directory: Path) -> list[Path]:
        """Writes the figure as PNG and SVG, with a title and a legend, and returns the paths."""
        with rc_context({**ON_PAPER.style(), "font.size": 10}):
            width = max(self.wide[0], 5.6)
            columns = next((n for n in (3, 2) if _breadth(list(self.legend), n) <= width), 1)
            rows = -(-len(self.legend) // columns) if len(self.legend) > 1 else 0
            height = self.wide[1] + 0.35 + 0.2 * rows
            figure = Figure(figsize=(width, height), facecolor=ON_PAPER.page)
            axes = figure.add_axes((0.11, (0.55 + 0.2 * rows) / height, 0.86, 1 - (0.95 + 0.2 * rows) / height))
            self.paint(axes, ON_PAPER)
            axes.set_title(self.title, color=ON_PAPER.text, fontsize=11, loc="left")
            if rows:
                figure.legend(
                    [_handle(look) for look in self.legend.values()], list(self.legend), loc="lower center",
                    ncols=columns, frameon=False, fontsize=8.5, labelcolor=ON_PAPER.text,
                )  # fmt: skip
            return paper.save(figure, directory, self.name, 200)


def _breadth(labels: Sequence[str], columns: int) -> float:
    """How wide a legend is about, in inches: in each column a line and the longest label."""
    rows = -(-len(labels) // columns)
    parts = [labels[start : start + rows] for start in range(0, len(labels), rows)]
    return sum(0.6 + 0.066 * max(map(len, part)) for part in parts)


def _axes(figure: Figure, size: tuple[float, float]) -> Axes:
    left, bottom = 0.58 / size[0], 0.5 / size[1]
    return figure.add_axes((left, bottom, 1 - left - 0.12 / size[0], 1 - bottom - 0.12 / size[1]))


def _handle(look: Look) -> Line2D:
    colour = ON_PAPER.series[look.colour]
    return Line2D(
        [], [], color=colour, marker=look.marker, markersize=5, linestyle=DASHES if look.dashed else "-",
        markerfacecolor=ON_PAPER.page if look.hollow else colour,
    )  # fmt: skip


@dataclass(frozen=True)
class Numbering:
    """The places of series and points in the page's data."""

    series: Mapping[str, int]
    points: Mapping[int, int]  # by id() of the point

    def mark(self, point: Point) -> str:
        return f"mark-{self.points[id(point)]}-{self.series[point.series]}"

    def ring(self, point: Point) -> str:
        return self.mark(point).replace("mark", "ring", 1)


def figure_name(text: str) -> str:
    """The name of a figure's file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "reward"
