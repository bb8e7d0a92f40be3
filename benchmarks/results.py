"""Reward against diversity for every method: trains what docs/results.md tells of, and prints its tables.

    python benchmarks/results.py --jobs 2        # two runs at a time; the same command continues
    python benchmarks/results.py --tables        # only the tables of what is there

The runs are those of results.yaml, results_ddpo.yaml and results_jpeg.yaml. All are evaluated on the same held-out
prompts and noise, so differences are paired. An interval holds 95% of a bootstrap over training seeds and prompts
together: n - 1 of the n of each are drawn with replacement (Rao and Wu 1988), and what is told is computed again from
the means of what was drawn. It tells what other seeds of training and other prompts would have given, of one seed what
other prompts would; the errors of `draftplus evaluate` and of a run's page are of other images of the same prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

import draftplus
from draftplus.report.grouping import Group, comparisons, seed_of
from draftplus.report.inputs import read_inputs
from draftplus.report.points import evaluation_at
from draftplus.report.read import Run
from draftplus.runs.rows import HeldOut, TargetRow, read_target

HERE = Path(__file__).parent
SWEEPS = ("results", "results_ddpo", "results_jpeg")
GAINS = (0.25, 0.5, 0.75, 1.0, 1.25)
DRAWS = 2000
STYLES = ("lpips", "style_entropy", "style_divergence", "vendi")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One way to draw, of every training seed on every prompt. reward, lpips: (seeds, prompts)."""

    label: str
    reward: Array
    lpips: Array


@dataclass(frozen=True)
class Curve:
    """Points that a knob connects, from the base model outwards, such as the steps of a run."""

    label: str
    points: list[Measured] = field(default_factory=list)


@dataclass(frozen=True)
class Draw:
    """Which seeds and prompts a mean is over."""

    seeds: Array
    prompts: Array

    def mean(self, values: Array) -> float:
        """The mean of (seeds, prompts) over those drawn; the base model has one row for all seeds."""
        rows = self.seeds if len(values) > 1 else np.ones(1)
        return float(rows @ values @ self.prompts / rows.sum() / self.prompts.sum())


def draws(seeds: int, prompts: int) -> list[Draw]:
    """All as they are first, then the bootstrap's."""
    generator = np.random.default_rng(0)

    def counts(n: int) -> Array:
        drawn = generator.integers(0, n, max(1, n - 1))
        return np.bincount(drawn, minlength=n).astype(float)

    whole = Draw(np.ones(seeds), np.ones(prompts))
    return [whole, *(Draw(counts(seeds), counts(prompts)) for _ in range(DRAWS))]


def estimate(told: Callable[[Draw], float | None], drawn: Sequence[Draw], digits: int = 2) -> str:
    """What `told` says of everything, and its interval. A dash where it says nothing."""
    value = told(drawn[0])
    if value is None:
        return "–"
    others = [other for draw in drawn[1:] if (other := told(draw)) is not None]
    low, high = np.quantile(others, [0.025, 0.975])
    share = 100 * len(others) / (len(drawn) - 1)  # a curve that never gains so much has no number there
    often = "" if share > 99.5 else f", in {share:.0f}% of draws"
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}{often})"


def measured(label: str, rows: Sequence[HeldOut], reward: str) -> Measured:
    """rows: what eval.jsonl says, one row of each seed."""
    lpips = np.array([list(row.lpips_per_prompt.values()) for row in rows])  # (seeds, prompts)
    scores = np.array([row.scores(reward) for row in rows])  # (seeds, prompts, images)
    return Measured(label, scores.mean(2), lpips)


def diversity_at(curve: Curve, gain: float, base: Measured, draw: Draw) -> float | None:
    """LPIPS where a curve has gained so much reward, interpolated between its points; the most varied such place.

    None where it never gains so much.
    """
    points = [(draw.mean(one.reward) - draw.mean(base.reward), draw.mean(one.lpips)) for one in [base, *curve.points]]
    crossings = []
    for (r0, d0), (r1, d1) in pairwise(points):
        if min(r0, r1) <= gain <= max(r0, r1) and r0 != r1:
            crossings.append(d0 + (gain - r0) / (r1 - r0) * (d1 - d0))
    return max(crossings, default=None)


@dataclass(frozen=True)
class Study:
    """Everything that was measured with one trained reward. finals: by label. groups: their runs."""

    base: Measured
    finals: dict[str, Measured]
    groups: dict[str, Group]
    early: Curve
    kl: Curve
    scale: Curve
    anneal: Curve
    prompts: list[str]

    @property
    def seeds(self) -> int:
        return max(len(one.reward) for one in self.finals.values())


def study(runs: Sequence[Run], reward: str) -> Study:
    """Runs of one comparison. Groups that lack a seed that others have are left out, and said."""
    (comparison,) = comparisons(runs)
    groups = {group.label: group for group in comparison.groups}
    most = max(len(group.runs) for group in groups.values())
    for label in [label for label, group in groups.items() if len(group.runs) < most]:
        print(f"(left out: {label} has {len(groups.pop(label).runs)} of {most} seeds)")
    for group in groups.values():
        group.runs.sort(key=seed_of)
    plain = groups["DRaFT-1"]
    finals = {label: measured(label, [last(run) for run in group.runs], reward) for label, group in groups.items()}
    steps = [one.step for one in plain.runs[0].evaluations][1:]
    early = [measured(f"step {step}", [at(run, step) for run in plain.runs], reward) for step in steps]
    strong_to_weak = sorted((g for g in groups.values() if g.method == "DRaFT+"), key=lambda g: -g.kl_coeff)
    kl = [finals[group.label] for group in strong_to_weak] + [finals["DRaFT-1"]]

    def variants(knob: str) -> list[Measured]:
        names = [v.label for v in plain.runs[0].evaluations[-1].variants if getattr(v, knob) is not None]
        rows = [
            [next(v.held_out for v in run.evaluations[-1].variants if v.label == name) for run in plain.runs]
            for name in names
        ]
        told = [measured(name, row, reward) for name, row in zip(names, rows, strict=True)]
        return [*sorted(told, key=lambda one: one.reward.mean()), finals["DRaFT-1"]]

    return Study(
        measured("base model", [plain.runs[0].evaluations[0].held_out], reward),
        finals,
        groups,
        Curve("DRaFT-1, stopped early", early),
        Curve("DRaFT+, over KL coefficients", kl),
        Curve("LoRA scale of DRaFT-1", variants("lora_scale")),
        Curve("AIG of DRaFT-1", variants("anneal")),
        plain.runs[0].evaluations[0].held_out.prompts,
    )


def at(run: Run, step: int) -> HeldOut:
    """What was measured at a step."""
    found = evaluation_at(run, step)
    assert found is not None, f"{run.name} has no evaluation of step {step}"
    return found.held_out


def last(run: Run) -> HeldOut:
    """What was measured at the last step."""
    return run.evaluations[-1].held_out


def seconds(group: Group) -> float:
    """Of training one run, by the median step of all runs."""
    per_step = median(row["seconds"] for run in group.runs for row in run.steps)
    return per_step * len(group.runs[0].steps)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def finals_table(made: Study, drawn: Sequence[Draw], held_out: str) -> None:
    """The last step of every method, and the knobs."""
    print(
        f"## The last step\n\nBase model: reward {made.base.reward.mean():.2f}, LPIPS {made.base.lpips.mean():.3f}.\n"
    )
    rows = []
    for label, one in made.finals.items():
        group = made.groups[label]
        beside = np.mean([last(run).rewards[held_out] for run in group.runs])
        rows.append([*told(made, label, one, drawn), f"{beside:.2f}", f"{seconds(group):.0f}"])
    for path in (made.early, made.scale, made.anneal):
        rows += [[*told(made, f"{path.label}: {one.label}", one, drawn), "", ""] for one in path.points[:-1]]
    table(["method", "gain in reward", "LPIPS, % of base", f"{held_out}", "seconds of training"], rows)


def told(made: Study, label: str, one: Measured, drawn: Sequence[Draw]) -> list[str]:
    """A row: what it is, its gain, and what of the base model's diversity it keeps."""
    return [
        label,
        estimate(lambda draw: draw.mean(one.reward) - draw.mean(made.base.reward), drawn),
        estimate(lambda draw: 100 * draw.mean(one.lpips) / draw.mean(made.base.lpips), drawn, 0).replace("+", ""),
    ]


def coefficient_table(made: Study, drawn: Sequence[Draw]) -> None:
    """From one KL coefficient to the next, and how many of the seeds go the same way."""
    print("## What the KL coefficient does\n")
    points = made.kl.points[::-1]
    rows = []
    for less, more in [*pairwise(points), (points[0], points[-1])]:
        up = (more.lpips.mean(1) > less.lpips.mean(1)).sum()
        down = (more.reward.mean(1) < less.reward.mean(1)).sum()
        rows.append([
            f"{less.label} → {more.label}",
            estimate(lambda d, a=less, b=more: d.mean(b.lpips) - d.mean(a.lpips), drawn, 3), f"{up} of {made.seeds}",
            estimate(lambda d, a=less, b=more: d.mean(b.reward) - d.mean(a.reward), drawn), f"{down} of {made.seeds}",
        ])  # fmt: skip
    table(["from, to", "LPIPS", "seeds in which it rises", "reward", "seeds in which it falls"], rows)


def equal_reward_table(made: Study, drawn: Sequence[Draw]) -> None:
    """LPIPS of each path at the same gain, less that of DRaFT stopped early."""
    print("## Diversity at equal reward\n")
    paths = [made.kl, made.scale, made.anneal]
    rows = []
    for gain in GAINS:
        row = [f"+{gain:g}", _plain(diversity_at(made.early, gain, made.base, drawn[0]))]
        for path in paths:

            def less(draw: Draw, curve: Curve = path, gain: float = gain) -> float | None:
                ours, rival = (diversity_at(one, gain, made.base, draw) for one in (curve, made.early))
                return None if ours is None or rival is None else ours - rival

            alone = [less(Draw(seed, np.ones(len(made.prompts)))) for seed in np.eye(made.seeds)]
            reached = [one for one in alone if one is not None]
            row.append(f"{estimate(less, drawn, 3)}; {sum(one > 0 for one in reached)} of {len(reached)} seeds")
        rows.append(row)
    table(["gain", f"LPIPS of {made.early.label}", *(f"{path.label}: more by" for path in paths)], rows)
    print("The last step of every other run, beside DRaFT-1 stopped at the same reward:\n")
    others = [one for label, one in made.finals.items() if label != "DRaFT-1"]
    rows = []
    for one in others:

        def more(draw: Draw, one: Measured = one) -> float | None:
            gain = draw.mean(one.reward) - draw.mean(made.base.reward)
            rival = diversity_at(made.early, gain, made.base, draw)
            return None if rival is None else draw.mean(one.lpips) - rival

        alone = [more(Draw(seed, np.ones(len(made.prompts)))) for seed in np.eye(made.seeds)]
        reached = [value for value in alone if value is not None]
        rows.append([one.label, estimate(more, drawn, 3), f"{sum(v > 0 for v in reached)} of {len(reached)}"])
    table(["method", "LPIPS: more by", "seeds in which it is more"], rows)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def against_draft_table(made: Study, drawn: Sequence[Draw], reward: str) -> None:
    """Every method less DRaFT-1, after half of the steps and after all."""
    print("## Beside DRaFT-1 after as many steps\n")
    plain, group = made.finals["DRaFT-1"], made.groups["DRaFT-1"]
    half = group.runs[0].evaluations[-1].step // 2
    rows = []
    for label, one in made.finals.items():
        if one is plain:
            continue
        halves = [[one.held_out for run in g.runs for one in run.evaluations if one.step == half] for g in
                  (made.groups[label], group)]  # fmt: skip
        cells = ["–"]
        if all(len(rows) == made.seeds for rows in halves):
            first, second = (measured("", rows, reward) for rows in halves)
            cells = [estimate(lambda d, a=first, b=second: d.mean(a.reward) - d.mean(b.reward), drawn)]
        cells += [
            estimate(lambda d, one=one: d.mean(one.reward) - d.mean(plain.reward), drawn),
            estimate(lambda d, one=one: d.mean(one.lpips) - d.mean(plain.lpips), drawn, 3),
            f"{seconds(made.groups[label]) / seconds(group):.2f}",
        ]
        rows.append([label, *cells])
    table(["method", f"reward after {half} steps", "reward at the end", "LPIPS at the end", "time, of DRaFT-1's"], rows)


def ddpo_table(made: Study, long: Run, reward: str) -> None:
    """The long run of DDPO, and when DRaFT-1 was as far."""
    print("## DDPO for longer, one seed\n")
    plain, base = made.groups["DRaFT-1"], made.base
    reached = [(0.0, 0.0)]
    reached += [(row.reward.mean() - base.reward.mean(), float(step)) for row, step in
                zip(made.early.points, (one.step for one in plain.runs[0].evaluations[1:]), strict=True)]  # fmt: skip
    per_step, own = seconds(plain) / len(plain.runs[0].steps), median(row["seconds"] for row in long.steps)
    drawn, rows = draws(1, len(made.prompts)), []
    for evaluation in long.evaluations[1:]:
        one = measured("", [evaluation.held_out], reward)

        def gained(draw: Draw, one: Measured = one) -> float:
            return draw.mean(one.reward) - draw.mean(base.reward)

        gain, low = gained(drawn[0]), float(np.quantile([gained(draw) for draw in drawn[1:]], 0.025))
        step = next(
            (s0 + (gain - g0) / (g1 - g0) * (s1 - s0) for (g0, s0), (g1, s1) in pairwise(reached) if g0 < gain <= g1),
            None,
        )
        time, known = own * evaluation.step, low > 0 and step is not None
        rows.append([
            str(evaluation.step), f"{time:.0f}", estimate(gained, drawn),
            f"{100 * one.lpips.mean() / base.lpips.mean():.0f}",
            f"{step * per_step:.0f}" if known else "–", f"{time / (step * per_step):.0f}" if known else "–",
        ])  # fmt: skip
    head = ["step", "seconds", "gain in reward", "LPIPS, % of base", "seconds of DRaFT-1 to that gain", "times longer"]
    table(head, rows)


def styles_table(told: Mapping[str, TargetRow]) -> None:
    """Measures of the last step that training does not take, with their standard errors over images."""
    print("## Styles, of the last step, one seed\n")
    rows = []
    for label, target in told.items():
        numbers = [target.metrics[name] for name in STYLES]
        rows.append([label, *(f"{one.mean:.3f} ± {one.standard_error:.3f}" for one in numbers)])
    table(["method", *STYLES], rows)


def jpeg_table(runs: Sequence[Run]) -> None:
    """The runs of results_jpeg.yaml."""
    print("## JPEG compressibility\n")
    (comparison,) = comparisons(runs)
    base = runs[0].evaluations[0].held_out
    rows = [["base model", *_jpeg_row(base, base)]]
    for group in comparison.groups:
        for one in group.runs[0].evaluations[1:]:
            rows.append([f"{group.label}, step {one.step}", *_jpeg_row(one.held_out, base)])
    table(["", "jpeg_compressibility", "gain", "LPIPS, % of base", "emoji_clip, held out"], rows)


def _jpeg_row(one: HeldOut, base: HeldOut) -> list[str]:
    reward, before = (row.rewards["jpeg_compressibility"] for row in (one, base))
    return [
        f"{reward:.2f}", f"{reward - before:+.2f}", f"{100 * one.lpips / base.lpips:.0f}",
        f"{one.rewards['emoji_clip']:.2f}",
    ]  # fmt: skip


def styles_of(made: Study, output: Path) -> dict[str, TargetRow]:
    """`draftplus evaluate` of the last step of each method's first seed."""
    runs = [(label, group.runs[0]) for label, group in made.groups.items()]
    told = draftplus.evaluate([str(run.directory) for _, run in runs], metrics=STYLES, output=output)
    rows = [read_target(target) for target in told["targets"]]
    targets = {row.run: row for row in rows}
    return {"base model": rows[0], **{label: targets[str(run.directory)] for label, run in runs}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, help="runs that train at the same time")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    parser.add_argument("--directory", type=Path, default=Path("sweeps"), help="where the sweeps are made")
    options = parser.parse_args()
    if not options.tables:
        for name in SWEEPS:
            draftplus.sweep(HERE / f"{name}.yaml", directory=options.directory, jobs=options.jobs)
    methods, ddpo, jpeg = (options.directory / name.replace("_", "-") for name in SWEEPS)
    made = study(read_inputs([methods]).runs, "emoji_clip")
    drawn = draws(made.seeds, len(made.prompts))
    print(f"{made.seeds} seeds, {len(made.prompts)} prompts\n")
    finals_table(made, drawn, "jpeg_compressibility")
    coefficient_table(made, drawn)
    equal_reward_table(made, drawn)
    against_draft_table(made, drawn, "emoji_clip")
    if ddpo.exists():
        ddpo_table(made, read_inputs([ddpo]).runs[0], "emoji_clip")
    if jpeg.exists():
        jpeg_table(read_inputs([jpeg]).runs)
    styles_table(styles_of(made, options.directory / "results-styles"))


if __name__ == "__main__":
    main()
