"""Colours, markers and line styles: one for each method, the same in every figure of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftplus.report import charts
from draftplus.report.points import ANNEAL, EARLY, SCALE, Series


@dataclass(frozen=True)
class Ink:
    """The colours that a figure is drawn in. series: those of the methods."""

    text: str
    muted: str
    grid: str
    page: str
    series: Sequence[str]

    def style(self) -> dict[str, Any]:
        """Settings of matplotlib."""
        faint = {"axes.edgecolor": self.grid, "grid.color": self.grid}
        strong = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), self.muted)
        return {**charts.STYLE, **faint, **strong, "path.simplify": False}


# on the page, colours are variables of its style sheet; files are for white paper
ON_PAGE = Ink(charts.TEXT, charts.INK, charts.GRID, charts.PAGE, charts.SERIES)
ON_PAPER = Ink(
    "#1b1f24", "#59636e", "#dfe3e8", "#ffffff",
    ("#0b6bb8", "#d1570a", "#1a7f4b", "#8249c9", "#0f828c", "#c2317b", "#8a5a12", "#c5283d", "#5b6b7b", "#77780c"),
)  # fmt: skip

KNOWN = {"DRaFT-1": 0, "DRaFT+": 1, "DDPO": 2, "DRaFT-LV": 3, "DRaFT-2": 4, "DRaFT-4": 5, SCALE: 6, ANNEAL: 7}
MARKERS = "osD^vP<X*h"


@dataclass(frozen=True)
class Look:
    """How a series is drawn. colour: its place in `Ink.series`. hollow, dashed: it varies another series."""

    colour: int
    marker: str
    dashed: bool = False

    @property
    def hollow(self) -> bool:
        return self.dashed


def looks_of(series: Sequence[Series]) -> dict[str, Look]:
    """The look of each series by its name: known methods always look the same, others take what is left."""
    told: dict[str, Look] = {}
    used: list[int] = []
    for one in sorted(series, key=lambda one: _known(one) is None):
        if one.kind == EARLY:
            continue
        place = _known(one)
        if place is None or place in used:
            place = next((i for i in range(len(charts.SERIES)) if i not in used), len(used) % len(charts.SERIES))
        used.append(place)
        marker = MARKERS[place] if used.count(place) == 1 else MARKERS[(place + 3) % len(MARKERS)]
        told[one.name] = Look(place, marker, one.kind in (SCALE, ANNEAL))
    for one in series:
        if one.kind == EARLY:
            of = told.get(one.of, Look(8, "o"))
            told[one.name] = Look(of.colour, of.marker, True)
    return told


def _known(series: Series) -> int | None:
    return KNOWN.get(series.kind, KNOWN.get(series.name))


def spare_look(number: int) -> Look:
    """The look of a method that has no point yet."""
    return Look(number % len(MARKERS), MARKERS[number % len(MARKERS)])
