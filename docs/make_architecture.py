"""Draws docs/images/architecture.svg, the packages and what they import, from the code: `make docs`.

layers.py says what stands in which layer, and in which order from left to right. A test holds the drawing current.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from layers import LAYERS, MODULES, ROOT, imports, inside, unit

PICTURE = Path(__file__).parent / "images" / "architecture.svg"

BANDS = {  # each is from its lowest layer to below the next one's
    "vocabulary": (0, "#eceff2"),
    "mathematics": (1, "#e4f2e7"),
    "adapters": (2, "#fcefdc"),
    "engine": (3, "#e9e8f8"),
    "surfaces": (8, "#dcecf9"),
}
NOT_DRAWN = {"__main__"}  # only calls cli
CAPTION = [
    "An arrow means “imports”. An import is not drawn where a longer path of arrows leads to the same package,",
    "nor where it is from the vocabulary, which everything may import.",
]

WIDTH = 1200
LEFT, RIGHT = 130, 1174  # where boxes may stand
ALONE = 600  # width of a box without neighbours; arrows pass on both sides
GAP, EDGE, ARC = 38, 13, 16  # between rows; between a box and its band's edge; of an arrow above its row
NAME, FILE, LINE = 7.9, 7.3, 17  # width of a letter in names and in files, height of a line

STYLE = """\
    text { font: 14px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
    text { fill: #4a545f; }
    .name, .file { font-family: Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; }
    .name, .file { text-anchor: middle; }
    .name { font-size: 13px; font-weight: 700; fill: #1b1f24; }
    .file { font-size: 12px; }
    .band { font-weight: 600; }
    .caption { font-size: 13px; }
    .card { fill: #ffffff; stroke: #d5dae0; }
    .box { fill: #ffffff; stroke: #4a545f; stroke-width: 1.5; }
    .arrow { fill: none; stroke: #1b1f24; stroke-width: 1.8; stroke-linejoin: round; }
"""

Edges = dict[str, set[str]]
Point = tuple[float, float]
Line = tuple[Point, Point]


class Box(NamedTuple):
    name: str
    lines: list[str]
    left: float
    top: float
    right: float
    bottom: float

    @property
    def x(self) -> float:
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        return (self.top + self.bottom) / 2


def picture() -> str:
    """The whole drawing as SVG."""
    edges = reduced(package_imports())
    boxes = placed(edges)
    arrows = routed(edges, boxes)
    below = max(box.bottom for box in boxes.values()) + EDGE
    height = below + 22 + 20 * len(CAPTION)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img"'
            ' aria-labelledby="title description">',
            "  <!-- Written by docs/make_architecture.py from the imports in src/draftplus: `make docs` -->",
            '  <title id="title">The packages of draftplus and what they import</title>',
            f'  <desc id="description">{description(edges)}</desc>',
            f"  <style>\n{STYLE}  </style>",
            '  <defs><marker id="head" viewBox="0 0 10 10" refX="10" refY="5" markerWidth="10" markerHeight="10"'
            ' markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 10 5 0 10z" fill="#1b1f24"/></marker></defs>',
            f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="12"/>',
            *drawn_bands(boxes, arrows),
            *drawn_arrows(arrows),
            *(line for box in boxes.values() for line in drawn_box(box)),
            *(f'  <text class="caption" x="28" y="{below + 26 + 20 * i:g}">{t}</text>' for i, t in enumerate(CAPTION)),
            "</svg>\n",
        ]
    )


def rows() -> list[list[str]]:
    """What is drawn, the vocabulary first."""
    return [[name for name in names if name not in NOT_DRAWN] for names in LAYERS]


def package_imports() -> Edges:
    """For each package and file above the vocabulary, which others of these it imports."""
    drawn = {name for names in rows()[1:] for name in names}
    edges: Edges = {name: set() for name in drawn}
    for module, path in MODULES.items():
        if (own := unit(module)) in drawn:
            edges[own] |= {unit(target) for target in imports(path) if inside(target)} & drawn - {own}
    return edges


def reduced(edges: Edges) -> Edges:
    """The transitive reduction: the edges that no longer path replaces. edges: without cycles."""

    def reached(name: str) -> set[str]:
        return edges[name].union(*(reached(target) for target in edges[name]))

    return {name: targets - set().union(*(reached(target) for target in targets)) for name, targets in edges.items()}


def placed(edges: Edges) -> dict[str, Box]:
    """A box for each package and file, row by row from the top; those of a row are of one height."""
    boxes: dict[str, Box] = {}
    top = 12.0 + EDGE
    for names in reversed(rows()):
        beside = [abs(names.index(a) - names.index(b)) for a in names for b in edges.get(a, set()) if b in names]
        top += ARC if max(beside, default=0) > 1 else 0
        space = 24 if beside else 14
        free = RIGHT - LEFT - space * (len(names) - 1)
        texts, widths = fitted(names, free if len(names) > 1 else ALONE)
        left = LEFT + (free - sum(widths)) / 2
        bottom = top + 38 + LINE * max(map(len, texts))
        for name, lines, width in zip(names, texts, widths, strict=True):
            boxes[name] = Box(name, lines, left, top, left + width, bottom)
            left += width + space
        top = bottom + GAP
    return boxes


def fitted(names: list[str], width: float) -> tuple[list[list[str]], list[float]]:
    """The boxes' lines, as few as let the boxes stand side by side, and the boxes' widths, which fill the given one."""
    for most in range(1, 30):
        texts = [wrapped(", ".join(files_of(name)), most) for name in names]
        needed = [
            18 + max(NAME * len(shown(name)), *(FILE * len(line) for line in lines), 0)
            for name, lines in zip(names, texts, strict=True)
        ]
        if sum(needed) <= width:
            return texts, [need + (width - sum(needed)) / len(names) for need in needed]
    raise ValueError(f"too many for one row of the drawing: {', '.join(names)}")


def wrapped(text: str, most: int) -> list[str]:
    """The text in at most so many lines, the longest as short as can be."""
    widths = range(max(map(len, text.split()), default=1), len(text) + 2)
    return next(lines for width in widths if len(lines := textwrap.wrap(text, width)) <= most)


def files_of(name: str) -> list[str]:
    return sorted(module.split(".", 2)[2] for module in MODULES if unit(module) == name and module.count(".") > 1)


def shown(name: str) -> str:
    return f"{name}/" if (ROOT / name).is_dir() else f"{name}.py"


def routed(edges: Edges, boxes: dict[str, Box]) -> dict[tuple[str, str], list[Point]]:
    """Each arrow's corners: the plainest route that touches no other box and no earlier arrow, or as few as can be."""
    arrows: dict[tuple[str, str], list[Point]] = {}
    for source, a in boxes.items():
        for target in sorted(edges.get(source, ()), key=list(boxes).index):
            b = boxes[target]
            others = [((box.left, box.top), (box.right, box.bottom)) for box in boxes.values() if box not in (a, b)]
            drawn = [line for points in arrows.values() for line in pairwise(points)]
            candidates = [points for _, points in sorted((effort(points, a, b), points) for points in routes(a, b))]
            free = (points for points in candidates if not touched(points, others, drawn))
            arrows[source, target] = next(free, None) or min(candidates, key=lambda p: touched(p, others, drawn))
    return arrows


def routes(a: Box, b: Box) -> Iterator[list[Point]]:
    """Ways to draw an arrow from a to b in right angles; b is in the same row or in a lower one."""
    lanes = sorted({*range(LEFT, RIGHT + 1, 10), a.x, b.x})
    on_a, on_b = ([x for x in lanes if box.left + 20 <= x <= box.right - 20] for box in (a, b))
    by_a, by_b = ([x for x in lanes if not box.left - 40 < x < box.right + 40] for box in (a, b))
    if a.y == b.y:
        yield [(side(a, b.x), a.y), (side(b, a.x), b.y)]
        yield [(a.x, a.top), (a.x, a.top - ARC), (b.x, b.top - ARC), (b.x, b.top)]
        return
    yield from ([(x, a.bottom), (x, b.top)] for x in on_a if x in on_b)
    yield from ([(side(a, x), a.y), (x, a.y), (x, b.top)] for x in by_a if x in on_b)
    yield from ([(x, a.bottom), (x, b.y), (side(b, x), b.y)] for x in on_a if x in by_b)
    yield from ([(side(a, x), a.y), (x, a.y), (x, b.y), (side(b, x), b.y)] for x in by_a if x in by_b)
    for y in (a.bottom + GAP / 2, b.top - GAP / 2):
        yield from ([(x, a.bottom), (x, y), (z, y), (z, b.top)] for x in on_a[::3] for z in on_b[::3])
        yield from ([(a.x, a.bottom), (a.x, y), (x, y), (x, b.y), (side(b, x), b.y)] for x in by_b)


def effort(points: list[Point], a: Box, b: Box) -> float:
    """How far from plain a route is: its corners, its length, and its ends' distances from the middles of the boxes."""
    length = sum(abs(x - u) + abs(y - v) for (x, y), (u, v) in pairwise(points))
    aside = sum(abs(x - box.x) / (box.right - box.left) for (x, _), box in ((points[0], a), (points[-1], b)))
    return 100 * len(points) + length / 4 + 100 * aside


def touched(points: list[Point], boxes: list[Line], arrows: list[Line]) -> int:
    """How many boxes and lines a route touches; a box, given by two corners, counts for ten."""
    lines = list(pairwise(points))
    return sum(10 * meet(line, box, 12) for line in lines for box in boxes) + sum(
        meet(line, other, 12) for line in lines for other in arrows
    )


def meet(a: Line, b: Line, margin: float) -> bool:
    """Whether two rectangles, each given by two corners, come closer than the margin. A line is a flat one."""
    ranges = zip(*a, *b, strict=True)  # of x, then of y
    return all(min(p, q) - margin < max(u, v) and min(u, v) - margin < max(p, q) for p, q, u, v in ranges)


def side(box: Box, x: float) -> float:
    return box.left if x < box.left else box.right


def drawn_bands(boxes: dict[str, Box], arrows: dict[tuple[str, str], list[Point]]) -> Iterator[str]:
    ends = [*[lowest for lowest, _ in BANDS.values()][1:], len(LAYERS)]
    for (title, (lowest, colour)), end in zip(BANDS.items(), ends, strict=True):
        names = {name for row in rows()[lowest:end] for name in row}
        heights = [y for name in names for y in (boxes[name].top, boxes[name].bottom)]
        heights += [y for pair, points in arrows.items() if names.issuperset(pair) for _, y in points]
        top, bottom = min(heights) - EDGE, max(heights) + EDGE
        yield f'  <rect x="12" y="{top:g}" width="{WIDTH - 24}" height="{bottom - top:g}" rx="10" fill="{colour}"/>'
        yield f'  <text class="band" x="28" y="{(top + bottom) / 2 + 5:g}">{title}</text>'


def drawn_arrows(arrows: dict[tuple[str, str], list[Point]]) -> Iterator[str]:
    for points in arrows.values():
        corners = " ".join(f"{x:g} {y:g}" for x, y in points)
        yield f'  <path class="arrow" marker-end="url(#head)" d="M{corners}"/>'


def drawn_box(box: Box) -> Iterator[str]:
    size = f'width="{box.right - box.left:g}" height="{box.bottom - box.top:g}"'
    yield f'  <rect class="box" x="{box.left:g}" y="{box.top:g}" {size} rx="8"/>'
    y = box.top + 24 if box.lines else box.y + 5
    yield f'  <text class="name" x="{box.x:g}" y="{y:g}">{shown(box.name)}</text>'
    for i, line in enumerate(box.lines, start=1):
        yield f'  <text class="file" x="{box.x:g}" y="{y + 2 + LINE * i:g}">{line}</text>'


def description(edges: Edges) -> str:
    told = [(name, sorted(edges.get(name, ()))) for names in reversed(rows()) for name in names]
    return "; ".join(f"{shown(name)} imports {', '.join(map(shown, targets))}" for name, targets in told if targets)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
