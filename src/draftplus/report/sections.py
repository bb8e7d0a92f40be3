"""A page's sections: what can be compared with what, and what is to be said of the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.config import base_model_of, flatten
from draftplus.progress import duration
from draftplus.report import mosaics, summary, tables
from draftplus.report.grouping import Comparison, comparisons, evaluated_prompts, finished, seed_of
from draftplus.report.inputs import Evaluated
from draftplus.report.points import Figures, complete, figures_of
from draftplus.report.read import Run


@dataclass(frozen=True)
class Section:
    """One comparison with everything that is drawn of it. prefix: makes names of files and ids unique."""

    comparison: Comparison
    figures: Figures
    prefix: str


def sections_of(runs: Sequence[Run], targets: Sequence[Evaluated]) -> list[Section]:
    """A section for each set of comparable runs; evaluated models join the one that was evaluated on their prompts.

    Evaluated models that join none have sections of their own, one for each base model and set of images.
    """
    sets = comparisons(runs)
    joined: list[list[Evaluated]] = [[] for _ in sets]
    apart: dict[tuple[object, ...], list[Evaluated]] = {}
    for target in targets:
        fitting = [i for i, one in enumerate(sets) if _fits(target, one.runs[0])]
        if len(fitting) == 1:
            joined[fitting[0]].append(target)
        else:
            apart.setdefault((target.model, target.images, *target.prompts), []).append(target)
    pairs = list(zip(sets, joined, strict=True))
    for members in apart.values():
        told = f"Evaluated models; {_count(len(members[0].prompts), 'prompt')}"
        pairs.append((Comparison(told, []), members))
    return [Section(one, figures_of(one, members), f"{i}-" if i else "") for i, (one, members) in enumerate(pairs)]


def _fits(target: Evaluated, run: Run) -> bool:
    """Whether both are of one base model, and images of the same prompts, as many of each."""
    flat = flatten(run.config)
    return (
        target.model == json.dumps(base_model_of(flat))
        and list(target.prompts) == evaluated_prompts(run)
        and target.images == flat.get("eval.images_per_prompt")
    )


def summary_line(runs: Sequence[Run], targets: Sequence[Evaluated], sections: Sequence[Section]) -> str:
    """How much there is: runs, settings, seeds, time."""
    groups = sum(len(section.comparison.groups) for section in sections)
    seeds = len({str(seed_of(run)) for run in runs})
    total = sum((summary.training_seconds(run) or (0.0,))[0] + summary.evaluation_seconds(run) for run in runs)
    told = [f"{_count(len(runs), 'run')} of {_count(groups, 'setting')}"] if runs else []
    told += [f"{seeds} training seeds"] if seeds > 1 else []
    told += [f"{duration(total)} in total"] if total else []
    told += [_count(len(targets), "evaluated model")] if targets else []
    where = f" {sections[0].comparison.title}." if len(sections) == 1 else ""
    return f"{', '.join(told)}.{where}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def notes(sections: Sequence[Section]) -> list[str]:
    """What a reader must know of the runs: which are apart, which did not finish, which are not in the averages."""
    told = []
    if len(sections) > 1:
        names = "; ".join(section.comparison.title for section in sections)
        told = [
            f"Different base models or evaluation prompts never share a figure, so these are shown separately: {names}"
        ]
    for section in sections:
        without = mosaics.left_out(section.comparison)
        if without:
            told.append(f"{', '.join(without)}: left out of the images side by side: too few images, or no room")
        for group in section.comparison.groups:
            told += [f"{run.name}: {tables.ended(run)}; not in the averages over seeds" for run in group.short]
            told += [f"{run.name}: same settings and seed as another run; not in the averages" for run in group.copies]
            told += [
                f"{run.name}: its last evaluation has numbers that are not finite; not in the averages"
                for run in group.runs
                if run.evaluations and not complete(run.evaluations[-1].held_out)
            ]
            unfinished = [run for run in group.runs if not finished(run)]
            told += [f"{run.name}: {tables.ended(run)}; shown as far as it got" for run in unfinished]
    return told
