"""Small pieces of the comparison page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from draftplus.report.looks import Look
from draftplus.report.points import BASE, Figures, Point
from draftplus.report.wording import show

MOST_LISTED = 8  # items of a list before the rest is folded away
NO_SHARE = "no share of the base model's, which is 0"
ENOUGH = 0.8  # of the base model's diversity

SHAPES = {
    "o": '<circle cx="14" cy="6" r="4.2"/>',
    "s": '<rect x="10.2" y="2.2" width="7.6" height="7.6"/>',
    "D": '<path d="M14 1 19 6 14 11 9 6z"/>',
    "^": '<path d="M14 1.4 18.6 10H9.4z"/>',
    "v": '<path d="M14 10.6 18.6 2H9.4z"/>',
    "P": '<path d="M12.4 1.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2V7.6H9.5V4.4h2.9z"/>',
    "<": '<path d="M9.4 6 18 1.4v9.2z"/>',
    "X": '<path d="m10 4 2-2 2 2 2-2 2 2-2 2 2 2-2 2-2-2-2 2-2-2 2-2z"/>',
    "*": '<path d="m14 .8 1.5 3.6 3.9.3-3 2.5 1 3.8L14 9l-3.4 2 1-3.8-3-2.5 3.9-.3z"/>',
    "h": '<path d="M14 1 18.3 3.5v5L14 11 9.7 8.5v-5z"/>',
}  # fmt: skip


def chips(looks: Mapping[str, Look], series: Mapping[str, int], shown: Mapping[str, bool]) -> str:
    """HTML of a switch for each series, which is the legend of every figure too."""
    told = []
    for name, number in series.items():
        if name == BASE:
            continue
        look, on = looks[name], shown.get(name, True)
        dash = ' stroke-dasharray="4 3"' if look.dashed else ""
        fill = "var(--page)" if look.hollow else f"var(--s{look.colour})"
        told.append(
            f'<button type="button" class="chip" data-chip="{number}" aria-pressed="{"true" if on else "false"}">'
            f'<svg viewBox="0 0 28 12" aria-hidden="true" style="stroke: var(--s{look.colour}); fill: {fill}">'
            f'<path d="M1 6h26" stroke-width="2"{dash}/>{SHAPES[look.marker]}</svg>{escape(name)}</button>'
        )
    return "".join(told)


def figure_block(svg: str, caption: str, kind: str, attributes: str = "") -> str:
    """HTML of a figure with its caption."""
    return f'<figure class="plot {kind}"{attributes}><figcaption>{caption}</figcaption>{svg}</figure>'


def problems_block(problems: Sequence[str]) -> str:
    """HTML of what could not be read or did not finish; empty without."""
    return _list("Incomplete", problems)


def missing_block(missing: Sequence[tuple[str, str]]) -> str:
    """HTML of the figures that cannot be drawn, each with what would make it; empty without."""
    return _list("Missing figures", [f"{name[0].upper()}{name[1:]}: {why}" for name, why in missing])


def _list(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    told = [f"<li>{escape(item)}</li>" for item in items]
    rest = told[MOST_LISTED:] if len(told) > MOST_LISTED + 1 else []
    more = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    first = "".join(told[: len(told) - len(rest)])
    return f'<section class="missing"><h2>{title}</h2><ul>{first}</ul>{more}</section>'


def cards(figures: Figures) -> str:
    """HTML of the numbers to see first: the base model, the highest reward, and the highest that stays varied."""
    if not figures.rewards or not figures.base:
        return ""
    name, base = figures.rewards[0], figures.base[0]
    measured = [(mean.value, p) for p in figures.shown() if (mean := p.reward(name)) is not None and p is not base]
    if not measured:
        return ""
    varied = [one for one in measured if 0 < ENOUGH * base.lpips.value <= one[1].lpips.value]
    told = [_card("Base model", base, name, base), _card("Highest reward", _first(measured), name, base)]
    if varied:
        told.append(
            _card(f"Highest reward with {ENOUGH:.0%} of the base model's diversity", _first(varied), name, base)
        )
    return f'<section class="cards" aria-label="Key numbers">{"".join(told)}</section>'


def _first(measured: Sequence[tuple[float, Point]]) -> Point:
    return max(measured, key=lambda one: one[0])[1]


def _card(title: str, point: Point, name: str, base: Point) -> str:
    mean = point.reward(name)
    error = f" ± {show(mean.error, mean.value)}" if mean and mean.error else ""
    alone = "; one training run" if len(point.runs) == 1 and point is not base else ""
    part = f"{point.lpips.value / base.lpips.value:.0%} of the base model's" if base.lpips.value > 0 else NO_SHARE
    share = "" if point is base else f" ({part})"
    return (
        f'<div class="card"><h3>{escape(title)}</h3><p class="value">{show(mean.value if mean else None)}{error}</p>'
        f'<p class="detail">{escape(name)}; {escape(point.label)}{alone}</p>'
        f'<p class="detail">LPIPS {show(point.lpips.value)}{share}</p></div>'
    )
