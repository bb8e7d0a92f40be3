"""Run directories of a study as curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.study.curves import Curve, Measures
from benchmarks.study.plan import Plan, read_done
from benchmarks.study.train import MEASURES
from draftplus.runs.journal import read_evaluations, read_rows
from draftplus.runs.rows import HeldOut, VariantRow, read_evaluation

SAME = 0.01  # of the base model's LPIPS: more than two kinds of device differ by


@dataclass(frozen=True)
class Study:
    """What was measured. curves: by setting, over its evaluations. steps: those of each curve's points.

    knobs: by label, curves over a knob of the sampling of `Plan.early` or a line of settings, at the last step.
    seconds: of a step, by setting. over: what intervals are over, one of `curves.OVER`.
    """

    plan: Plan
    base: Measures
    prompts: list[str]
    curves: Mapping[str, Curve]
    steps: Mapping[str, list[int]]
    knobs: Mapping[str, Curve]
    names: Mapping[str, list[str]]
    seconds: Mapping[str, float]
    over: str = "both"


def read_study(plan: Plan, directory: Path, only: Collection[int] | None = None) -> Study:
    """The finished runs below a directory; what is not finished does not count. only: training seeds; None: all.

    Raises ValueError where there is none, or runs are not of the same base model and evaluation.
    """
    curves, steps, seconds, bases = {}, {}, {}, list[Measures]()
    knobs: dict[str, Curve] = {}
    names: dict[str, list[str]] = {}
    prompts: list[str] | None = None
    for name, setting in plan.settings.items():
        here = {int(run.name.removeprefix("seed-")): run for run in (directory / name).glob("seed-*")}
        runs = {
            seed: run for seed, run in here.items() if (only is None or seed in only) and read_done(run) is not None
        }
        if not runs:
            continue
        seeds = tuple(sorted(runs))
        rows = [[read_evaluation(row) for row in read_evaluations(runs[seed] / "eval.jsonl")] for seed in seeds]
        beside = [_beside(runs[seed]) for seed in seeds]
        at = [row.step for row in rows[0]]
        if any([row.step for row in one] != at for one in rows):
            raise ValueError(f"{directory / name}: its seeds were evaluated at different steps")
        for evaluations in rows:
            prompts = prompts or evaluations[0].held_out.prompts
            if any(row.held_out.prompts != prompts for row in evaluations):
                raise ValueError(f"{directory / name}: runs were evaluated on different prompts")
        points = tuple(
            _stacked([_measures(r[i].held_out, plan, b.get(step)) for r, b in zip(rows, beside, strict=True)])
            for i, step in enumerate(at)
        )
        bases.append({key: values[:1] for key, values in points[0].items()})
        curves[name], steps[name] = Curve(setting.label, seeds, points[1:]), at[1:]
        seconds[name] = median(row["seconds"] for run in runs.values() for row in read_rows(run / "metrics.jsonl"))
        if name == plan.early:
            last = [{one.label: one for one in evaluations[-1].variants} for evaluations in rows]
            for label, told in (("LoRA scale", _has("lora_scale")), ("annealing", _has("anneal"))):
                if chosen := [str(key) for key, one in last[0].items() if told(one)]:
                    each = [_stacked([_measures(one[key].held_out, plan) for one in last]) for key in chosen]
                    order = sorted(range(len(chosen)), key=lambda i: float(each[i][plan.reward].mean()))
                    whole = {key: points[-1][key] for key in each[0]}
                    title = f"{setting.label}, over its {label}"
                    begins = label == "LoRA scale"  # of 0, which is the base model
                    knobs[title] = Curve(title, seeds, (*(each[i] for i in order), whole), begins)
                    names[title] = [*(chosen[i] for i in order), setting.label]
    if prompts is None:
        raise ValueError(f"{directory}: no finished run of this plan")
    for base in bases:
        lpips = [float(one["lpips"].mean()) for one in (base, bases[0])]
        if abs(lpips[0] / lpips[1] - 1) > SAME:
            raise ValueError(f"{directory}: runs are of different base models, with LPIPS of {lpips[0]} and {lpips[1]}")
    return Study(plan, bases[0], prompts, curves, steps, knobs, names, seconds)


def _has(knob: str) -> Callable[[VariantRow], bool]:
    return lambda one: getattr(one, knob) is not None


def _measures(row: HeldOut, plan: Plan, beside: Mapping[str, Any] | None = None) -> dict[str, list[float]]:
    """What was measured of each prompt."""
    told: dict[str, Any] = {"lpips": list(row.lpips_per_prompt.values())}
    for name in filter(None, (plan.reward, plan.held_out)):
        scores = row.scores(name)
        if scores is not None:
            told[name] = np.array(scores, float).mean(1).tolist()
    return {**told, **{key: values for key, values in (beside or {}).items() if key != "step"}}


def _stacked(seeds: Sequence[Mapping[str, list[float]]]) -> Measures:
    """(seeds, prompts) of all that was measured in every seed."""
    names = [name for name in seeds[0] if all(name in one for one in seeds)]
    return {name: np.array([one[name] for one in seeds], float) for name in names}


def _beside(run: Path) -> dict[int, dict[str, Any]]:
    path = run / MEASURES
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return {row["step"]: row for row in rows}
