"""The tables of docs/results.md, from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from benchmarks.study.curves import (
    Array,
    Compared,
    Curve,
    Draws,
    at_gain,
    bootstrap,
    compared,
    difference_of,
    each_seed,
    estimate,
    gains,
    joined,
    scatter,
)
from benchmarks.study.reading import Study
from benchmarks.study.train import METRICS

GAINS = (0.5, 0.75, 1.0, 1.25)
MANY = 0.5  # a share of seeds that has to reach a gain for a curve to be a rival or a winner there

Row = list[str]


@dataclass(frozen=True)
class Rival:
    """What settings are measured against, at each gain: a curve that does not depend on a draw."""

    label: str
    at: Callable[[float], Curve | None]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def drawn_of(made: Study, curve: Curve) -> Draws:
    """The draws that a curve's intervals come from."""
    return bootstrap(len(curve.seeds), len(made.prompts), over=made.over)


def percent_at(made: Study, gain: float) -> Callable[[Curve, Draws], Array]:
    """LPIPS at a gain in percent of the base model's, for each draw."""

    def value(curve: Curve, drawn: Draws) -> Array:
        kept = at_gain(curve, gain, made.base, made.plan.reward, "lpips", drawn)
        percent: Array = 100 * kept / drawn.mean(made.base["lpips"])
        return percent

    return value


def reaching(made: Study, curve: Curve, gain: float) -> Array:
    """LPIPS at a gain of each seed in percent of the base model's, NaN of those that never get there."""
    return percent_at(made, gain)(curve, each_seed(len(curve.seeds), len(made.prompts)))


def lines(made: Study) -> dict[str, Curve]:
    """The lines over a knob, at the last step."""
    told = dict(made.knobs)
    for label, names in made.plan.lines.items():
        here = [made.curves[name] for name in names if name in made.curves]
        if len(here) > 1:
            told[label] = joined(label, here)
    return told


def rivals(made: Study) -> list[Rival]:
    """DRaFT stopped early, DRaFT+ as chosen beforehand, and for each line its best setting and itself."""
    plan, told = made.plan, []
    for curve in stopped(made):
        told.append(Rival(f"{curve.label}, stopped early", partial(_always, curve)))
    for label, names in plan.lines.items():
        here = [made.curves[name] for name in names if name in made.curves and name != plan.early]
        if here:
            told.append(Rival(f"{label}: the best of all", partial(best, made, here)))
    for label, curve in lines(made).items():
        told.append(Rival(label, partial(_always, curve)))
    return told


def stopped(made: Study) -> list[Curve]:
    """The rivals whose evaluations are a line: DRaFT, and what was chosen beforehand."""
    names = (made.plan.early or "", made.plan.fixed or "")
    return [made.curves[name] for name in names if name in made.curves]


def others(made: Study) -> list[str]:
    """What was measured beside the trained reward and LPIPS."""
    return [name for name in (made.plan.held_out or "", *METRICS) if name in made.base]


def _always(curve: Curve, gain: float) -> Curve:
    return curve


def best(made: Study, curves: Sequence[Curve], gain: float) -> Curve | None:
    """The curve with the highest LPIPS at a gain, by all its seeds, of those that get there in half of them."""
    kept: dict[int, float] = {}
    for number, curve in enumerate(curves):
        value = percent_at(made, gain)(curve, drawn_of(made, curve))[0]
        if not np.isnan(value) and (~np.isnan(reaching(made, curve, gain))).mean() >= MANY:
            kept[number] = float(value)
    return curves[max(kept, key=lambda number: kept[number])] if kept else None


def against(made: Study, curve: Curve, rival: Rival, gain: float) -> Compared:
    """LPIPS of a curve less that of a rival at a gain, in percent of the base model's."""
    other = rival.at(gain)
    if other is None:
        return Compared(None, 0, 0, 0)
    return compared(curve, other, difference_of(percent_at(made, gain)), len(made.prompts), made.over)


def equal_gain(made: Study) -> str:
    """What every setting keeps where it has gained so much, in how many seeds it does, and how these scatter."""
    rows = list[Row]()
    for curve in [*made.curves.values(), *lines(made).values()]:
        row, drawn = [curve.label], drawn_of(made, curve)
        for gain in GAINS:
            alone, told = reaching(made, curve, gain), estimate(percent_at(made, gain)(curve, drawn))
            reached = f"{(~np.isnan(alone)).sum()} of {len(alone)} seeds"
            spread = "" if np.isnan(value := scatter(alone)) else f", ± {value:.1f}"
            row.append(f"{told.told(sign=False) if told else '–'}; {reached}{spread}")
        rows.append(row)
    return table(["setting", *(f"gain {gain:g}" for gain in GAINS)], rows)


def summary(made: Study, rival: Rival) -> str:
    """The differences from one rival at every gain."""
    rows = [
        [
            curve.label,
            *(("" if rival.at(gain) is curve else against(made, curve, rival, gain).told()) for gain in GAINS),
        ]
        for curve in [*made.curves.values(), *lines(made).values()]
    ]
    return table(["setting", *(f"gain {gain:g}" for gain in GAINS)], rows)


def chosen_apart(made: Study) -> str:
    """For each gain, the best new setting by one half of the seeds, measured on the other half: a winner that is told
    by the same seeds that chose it looks better than it is."""
    rows = []
    candidates = {name: curve for name, curve in made.curves.items() if name not in made.plan.rivals}
    for gain in GAINS:
        for which, parity in (("even", 0), ("odd", 1)):
            halves = {}
            for name, curve in candidates.items():
                here, there = ([s for s in curve.seeds if s % 2 == one] for one in (parity, 1 - parity))
                if here and there:
                    halves[name] = (curve.of(here), curve.of(there))
            winner = best(made, [here for here, _ in halves.values()], gain)
            if winner is None:
                rows.append([f"{gain:g}", which, "–"])
                continue
            other = next(there for here, there in halves.values() if here is winner)
            rows.append(
                [f"{gain:g}", which, winner.label, *(against(made, other, one, gain).told() for one in rivals(made))]
            )
    heads = [f"less {rival.label}" for rival in rivals(made)]
    return table(["gain", "chosen by the seeds that are", "setting", *heads],
                 [[*row, *[""] * (3 + len(heads) - len(row))] for row in rows])  # fmt: skip


def finals(made: Study) -> str:
    """The last step of every setting, and the knobs."""
    base, beside = made.base, others(made)
    rows = [["base model", "", "", "100", *(_plain(base[name]) for name in beside), ""]]
    for name, curve in made.curves.items():
        rows.append(_final(made, curve.label, curve.at(-1), beside, f"{made.seconds[name]:.3g}"))
    for label, curve in made.knobs.items():
        for number, what in enumerate(made.names[label][:-1]):
            rows.append(_final(made, f"{label}: {what}", curve.at(number), beside, ""))
    return table(["setting", "seeds", "gain in reward", "LPIPS, % of base", *beside, "seconds per step"], rows)


def _final(made: Study, label: str, curve: Curve, beside: Sequence[str], seconds: str) -> Row:
    drawn, point = drawn_of(made, curve), curve.points[0]
    gain = estimate(gains(curve, made.base, made.plan.reward, drawn)[0])
    kept = estimate(100 * drawn.mean(point["lpips"]) / drawn.mean(made.base["lpips"]))
    told = [_plain(point[name]) if name in point else "" for name in beside]
    kept_told = kept.told(0, False) if kept else "–"
    return [label, str(len(curve.seeds)), gain.told(2) if gain else "–", kept_told, *told, seconds]


def _plain(values: Array) -> str:
    return f"{values.mean():.2f}".replace("-", "−")


def beside_early(made: Study) -> str:
    """The last step of every setting less DRaFT stopped where it had gained as much, for those that gain little too."""
    plan, base, rows = made.plan, made.base, list[Row]()
    beside = stopped(made)

    def difference(ours: Curve, rival: Curve, drawn: Draws) -> Array:
        gain = gains(ours, base, plan.reward, drawn)[-1]
        kept = at_gain(rival, gain, base, plan.reward, "lpips", drawn)
        percent: Array = 100 * (drawn.mean(ours.points[-1]["lpips"]) - kept) / drawn.mean(base["lpips"])
        return percent

    for curve in made.curves.values():
        told = [
            "" if one is curve else compared(curve.at(-1), one, difference, len(made.prompts), made.over).told()
            for one in beside
        ]
        rows.append([curve.label, *told])
    return table(["setting", *(f"less {one.label}, stopped early" for one in beside)], rows)


def coefficients(made: Study) -> str:
    """From each setting of a line to the next stronger one, and from its weakest to its strongest, at the last step."""
    rows = list[Row]()
    for names in made.plan.lines.values():
        here = [made.curves[name].at(-1) for name in reversed(names) if name in made.curves]
        for less, more in [*pairwise(here), *([(here[0], here[-1])] if len(here) > 2 else [])]:
            row = [f"{less.label} → {more.label}"]
            for name, scale in (("lpips", 100 / made.base["lpips"].mean()), (made.plan.reward, 1)):

                def value(one: Curve, drawn: Draws, name: str = name, scale: float = scale) -> Array:
                    scaled: Array = scale * drawn.mean(one.points[0][name])
                    return scaled

                told = compared(more, less, difference_of(value), len(made.prompts), made.over)
                row.append(told.told(1 if scale > 1 else 2))
            rows.append(row)
    return table(["from, to", "LPIPS, % of base; rises in", "reward; rises in"], rows)


def others_at(made: Study, gain: float) -> str:
    """What else was measured, where each setting has gained so much; and its difference from DRaFT stopped early."""
    early, rows = made.curves.get(made.plan.early or ""), list[Row]()
    names = others(made)
    for curve in made.curves.values():
        row = [curve.label]
        for name in names:

            def value(one: Curve, drawn: Draws, name: str = name) -> Array:
                return at_gain(one, gain, made.base, made.plan.reward, name, drawn)

            known = all(name in point for point in curve.points)
            told = estimate(value(curve, drawn_of(made, curve))) if known else None
            row.append(_plain(np.array(told.value)) if told else "–")
            if early is None or curve is early or told is None:
                row.append("")
            else:
                row.append(compared(curve, early, difference_of(value), len(made.prompts), made.over).told(2))
        rows.append(row)
    head = [text for name in names for text in (name, f"{name}, less {early.label if early else ''} stopped early")]
    return table(["setting", *head], rows)


def over_training(made: Study) -> str:
    """The gain at every evaluation and how much it scatters over training seeds."""
    rows = []
    for name, curve in made.curves.items():
        alone = gains(curve, made.base, made.plan.reward, each_seed(len(curve.seeds), len(made.prompts)))
        for step, values, point in zip(made.steps[name], alone, curve.points, strict=True):
            kept = 100 * point["lpips"].mean(1) / made.base["lpips"].mean()
            rows.append([
                curve.label, str(step), str(len(values)), f"{values.mean():+.2f}", _deviation(values, 3),
                f"{values.min():+.2f} to {values.max():+.2f}", f"{kept.mean():.1f}", _deviation(kept, 1),
            ])  # fmt: skip
    head = ["setting", "step", "seeds", "gain", "deviation over seeds", "range", "LPIPS, % of base", "deviation"]
    return table(head, [[row[0], *(cell.replace("-", "−") for cell in row[1:])] for row in rows])


def _deviation(values: Array, digits: int) -> str:
    return "–" if np.isnan(value := scatter(values)) else f"{value:.{digits}f}"


def sections(made: Study) -> Iterator[str]:
    """Everything, as Markdown."""
    seeds = sorted({seed for curve in made.curves.values() for seed in curve.seeds})
    over = "training seeds and prompts" if made.over == "both" else f"{made.over} alone"
    told = f"{len(seeds)} training seeds, {len(made.prompts)} prompts, {len(made.curves)} settings"
    yield f"{told}; intervals are over {over}.\n"
    base = f"{made.base[made.plan.reward].mean():.2f}, LPIPS {made.base['lpips'].mean():.3f}"
    yield f"## The last step\n\nBase model: reward {base}.\n\n{finals(made)}"
    if made.plan.lines:
        yield f"## Along each line\n\n{coefficients(made)}"
    if made.plan.early in made.curves:
        yield (
            "## LPIPS at equal gain\n\nIn percent of the base model's, with how many seeds get there alone, and ± the "
            f"deviation over these.\n\n{equal_gain(made)}"
        )
        for rival in rivals(made):
            title = f"## LPIPS at equal gain, less {rival.label}"
            yield f"{title}\n\nIn percent of the base model's.\n\n{summary(made, rival)}"
        yield f"## The last step at equal gain\n\nLPIPS in percent of the base model's.\n\n{beside_early(made)}"
        yield f"## Chosen by one half of the seeds, measured on the other\n\n{chosen_apart(made)}"
        if others(made):
            yield f"## Other measures at a gain of 1\n\n{others_at(made, 1.0)}"
    yield f"## Over training\n\n{over_training(made)}"
