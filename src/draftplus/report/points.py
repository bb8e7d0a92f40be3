"""The points of the comparison figures: rewards and diversity of each setting, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from draftplus.config import flatten
from draftplus.report import summary
from draftplus.report.grouping import (
    METHOD_KEYS,
    Comparison,
    Group,
    Mean,
    differing_keys,
    last_step,
    mean_over,
    seed_of,
    settings_of,
)
from draftplus.report.inputs import Evaluated
from draftplus.report.read import Run
from draftplus.report.wording import setting
from draftplus.runs.rows import EvaluationRow, HeldOut, VariantRow, reward_key, reward_names

BASE = "base model"
FINAL, EARLY, SCALE, ANNEAL, EVALUATED = "final", "early", "scale", "anneal", "evaluated"


@dataclass(frozen=True)
class Point:
    """One setting. x: its value on the axis of its kind (KL coefficient, step or scale). symbol: of the coefficient."""

    series: str
    label: str
    rewards: dict[str, Mean]
    lpips: Mean
    runs: tuple[Run, ...] = ()
    step: int | None = None
    x: float = 0.0
    source: str = ""
    symbol: str = "β"

    def reward(self, name: str) -> Mean | None:
        """A reward's mean, where it was measured."""
        return self.rewards.get(name)


@dataclass
class Series:
    """Points that a line joins. kind: FINAL, EARLY, SCALE, ANNEAL or EVALUATED. of: the method that they vary.

    start, end: points of other series where the line begins and ends, such as the base model. shown: whether it is
    drawn at first; on the page every series can be switched on.
    """

    name: str
    kind: str
    of: str
    points: list[Point] = field(default_factory=list)
    start: Point | None = None
    end: Point | None = None
    shown: bool = True

    def path(self) -> list[Point]:
        """Every point of the line, in order."""
        return [*([self.start] if self.start else []), *self.points, *([self.end] if self.end else [])]


@dataclass(frozen=True)
class Figures:
    """What the figures of one comparison are drawn from. rewards: the trained ones first."""

    base: list[Point]
    series: list[Series]
    rewards: list[str]

    def points(self) -> list[Point]:
        """Every point once, the base model's first."""
        return [*self.base, *(point for series in self.series for point in series.points)]

    def shown(self) -> list[Point]:
        """The points of the series that are drawn at first."""
        return [*self.base, *(point for series in self.series if series.shown for point in series.points)]


def figures_of(comparison: Comparison, targets: Sequence[Evaluated] = ()) -> Figures:
    """All points of a comparison."""
    trained = dict.fromkeys(name for run in comparison.runs for name in run.config.get("reward") or {})
    evaluations = (one.held_out for run in comparison.runs for one in run.evaluations)
    measured = dict.fromkeys(summary.held_out_rewards(evaluations))
    measured.update(dict.fromkeys(reward_names(name for target in targets for name in target.metrics)))
    names = [*(name for name in trained if name in measured), *(name for name in measured if name not in trained)]
    base = _base(comparison.runs)
    start = base[0] if len(base) == 1 else None
    series = [
        *_final(comparison.groups, start),
        *(one for group in comparison.groups for one in _without_retraining(group, start)),
        *_evaluated(targets),
    ]
    series = [one for one in series if one.points]
    for one in [one for one in series if one.kind == EARLY][1:]:
        one.shown = False  # the first method's is the rival to beat; those of all would hide it
    return Figures(base, series, names)


def pareto(points: Sequence[Point], reward: str) -> list[Point]:
    """The points that no other beats in both reward and diversity, from the lowest reward to the highest."""
    measured = [(r.value, point.lpips.value, point) for point in points if (r := point.reward(reward)) is not None]
    measured = [one for one in measured if math.isfinite(one[0]) and math.isfinite(one[1])]
    front: list[Point] = []
    best = -math.inf
    for _, lpips, point in sorted(measured, key=lambda one: (-one[0], -one[1])):
        if lpips > best:
            front.append(point)
            best = lpips
    return front[::-1]


def evaluation_at(run: Run, step: int) -> EvaluationRow | None:
    """The evaluation of a step, where there was one."""
    return next((one for one in run.evaluations if one.step == step), None)


def complete(row: HeldOut) -> bool:
    """Whether all that an evaluation measured are finite numbers."""
    return all(value is not None and math.isfinite(value) for value in (row.lpips, *row.rewards.values()))


def _point(series: str, label: str, rows: Sequence[tuple[Run, HeldOut]], x: float, step: int | None) -> Point | None:
    """The mean of the rows, one of each seed; None where no diversity or no reward was measured.

    A row with a number that is not finite is left out of all of them, so that all are means over the same seeds.
    """
    rows = [(run, row) for run, row in rows if complete(row)]
    lpips = mean_over([row.lpips for _, row in rows if row.lpips is not None])
    rewards = {}
    for name in summary.held_out_rewards(row for _, row in rows):
        mean = mean_over([value for _, row in rows if (value := row.rewards.get(name)) is not None])
        if mean is not None:
            rewards[name] = mean
    if lpips is None or not rewards:
        return None
    return Point(series, label, rewards, lpips, tuple(run for run, _ in rows), step, x)


def _base(runs: Sequence[Run]) -> list[Point]:
    """The base model at step 0, once for each way in which it was sampled; training's seed plays no part in it."""
    ways: dict[str, list[tuple[Run, HeldOut]]] = {}
    for run in runs:
        base = evaluation_at(run, 0)
        if base is not None and complete(base.held_out):
            sampler = {k: v for k, v in flatten(run.config).items() if k.startswith("sampler.")}
            ways.setdefault(repr(sampler), []).append((run, base.held_out))
    points = []
    for rows in ways.values():
        run, row = rows[0]
        # rewards that only some of the runs measured
        merged = {name: mean for _, other in rows[::-1] for name, mean in other.rewards.items()}
        label = _base_label(run, [r for other in ways.values() for r, _ in other[:1]])
        point = _point(BASE, label, [(run, replace(row, rewards=merged))], 0.0, 0)
        if point is not None:
            points.append(point)
    return points


def _base_label(run: Run, others: Sequence[Run]) -> str:
    keys = [key for key in differing_keys(others) if key.startswith("sampler.")]
    told = ", ".join(f"{key.rpartition('.')[2]} {setting(flatten(run.config).get(key))}" for key in keys)
    return f"{BASE} ({told})" if told else BASE


def _final(groups: Sequence[Group], base: Point | None) -> list[Series]:
    """A line for each method, over its KL coefficients; DRaFT+ begins at DRaFT, which is its coefficient 0.

    On the path it begins at the method without that part of the term, whose own coefficient β may be any.
    """
    told: dict[str, Series] = {}
    of: dict[str, list[Group]] = {}
    for group in groups:
        of.setdefault(group.method, []).append(group)
        rows = [(run, run.evaluations[-1].held_out) for run in group.runs if last_step(run) > 0]
        if not rows:
            continue
        point = _point(group.method, group.label, rows, group.kl_coeff, max(last_step(run) for run, _ in rows))
        if point is not None:
            point = replace(point, symbol=group.symbol)
            told.setdefault(group.method, Series(group.method, FINAL, group.method)).points.append(point)
    for name, series in told.items():
        first = of[name][0]
        begin = [one for one in of.get(first.plain, ()) if one.kl_coeff == first.plain_coeff]
        if first.plain != name and len(begin) == 1 and first.plain in told and _alike(begin[0], first):
            at = [point for point in told[first.plain].points if point.x == first.plain_coeff]
            series.start = at[0] if at else None
        series.points.sort(key=lambda point: point.x)
    return list(told.values())


def _alike(plain: Group, group: Group) -> bool:
    """Whether only the KL coefficient tells two groups apart."""
    one, other = ({k: v for k, v in settings_of(g.runs[0]).items() if k not in METHOD_KEYS} for g in (plain, group))
    return one == other


def _without_retraining(group: Group, base: Point | None) -> Iterable[Series]:
    """Early stopping of a method without KL, and every variant of the last evaluation, each as a line of its own."""
    rows = [(run, run.evaluations[-1].held_out) for run in group.runs if run.evaluations]
    final = _point(group.method, group.label, rows, group.kl_coeff, None) if rows else None
    if group.kl_coeff == 0:
        last = max((last_step(run) for run in group.runs), default=0)
        steps = sorted({one.step for run in group.runs for one in run.evaluations if 0 < one.step < last})
        early = Series(f"{group.method}, stopped early", EARLY, group.method, [], base, final)
        for step in steps:
            at = [(run, one.held_out) for run in group.runs if (one := evaluation_at(run, step)) is not None]
            point = _point(early.name, f"{group.label}, step {step}", at, step, step)
            early.points += [point] if point is not None else []
        yield early
    yield _variants(group, f"LoRA scale of {group.label}", SCALE, _scale, base, final)
    yield _variants(group, f"AIG of {group.label}", ANNEAL, _anneal, base, final)
    yield _variants(group, f"variants of {group.label}", EVALUATED, _other, None, None)


def _scale(variant: VariantRow) -> bool:
    return variant.lora_scale is not None and variant.anneal is None and variant.checkpoint is None


def _anneal(variant: VariantRow) -> bool:
    return variant.anneal is not None and variant.lora_scale in (None, 1) and variant.checkpoint is None


def _other(variant: VariantRow) -> bool:
    return not _scale(variant) and not _anneal(variant)


def _variants(
    group: Group, name: str, kind: str, wanted: Callable[[VariantRow], bool], base: Point | None, final: Point | None
) -> Series:
    """The variants of one kind, averaged over the runs that have them."""
    series = Series(name, kind, group.method)
    by_label: dict[str, list[tuple[Run, VariantRow]]] = {}
    for run in group.runs:
        for variant in run.evaluations[-1].variants if run.evaluations else ():
            if wanted(variant):
                by_label.setdefault(variant.label or "unnamed", []).append((run, variant))
    for label, members in by_label.items():
        scale = members[0][1].lora_scale if kind == SCALE else None
        rows = [(run, variant.held_out) for run, variant in members]
        point = _point(name, f"{group.label}, {label}", rows, scale or 0.0, None)
        if point is not None:
            series.points.append(point)
    if kind == SCALE:
        series.points.sort(key=lambda point: point.x)
    else:
        series.points.sort(key=lambda point: next(iter(point.rewards.values())).value)
    if series.points and kind in (SCALE, ANNEAL):
        series.start, series.end = base, final
    return series


def _evaluated(targets: Sequence[Evaluated]) -> list[Series]:
    """The targets of eval.json files, a series for each file."""
    told: dict[str, Series] = {}
    for target in targets:
        if "lpips" not in target.metrics:
            continue
        rewards = {name: Mean(target.mean(reward_key(name))) for name in reward_names(target.metrics)}
        if not rewards:
            continue
        name = f"evaluated ({target.source})"
        lpips = Mean(target.mean("lpips"))
        series = told.setdefault(target.source, Series(name, EVALUATED, name))
        series.points.append(Point(name, target.label, rewards, lpips, (), target.step, 0.0, target.source))
    return list(told.values())


def seeds_told(point: Point) -> str:
    """The training seeds of a point, in words."""
    seeds = sorted({str(seed_of(run)) for run in point.runs})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""
