"""What a report is made from: runs, sweeps and evaluations. What cannot be read is listed, and the rest is used."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draftplus.config import trains_reward
from draftplus.errors import UserError
from draftplus.report.read import Run, loads, read_run
from draftplus.runs.rows import MetricRow, read_target

MANIFEST, EVALUATION = "manifest.json", "eval.json"


@dataclass(frozen=True)
class Evaluated:
    """One evaluated model of an eval.json.

    source: the file. metrics: those with a mean. model: the base model's keys, as JSON; images: of a prompt.
    """

    label: str
    source: str
    metrics: Mapping[str, MetricRow]
    step: int | None = None
    prompts: tuple[str, ...] = ()
    model: str | None = None
    images: int | None = None

    def mean(self, name: str) -> float:
        """A metric's mean."""
        mean = self.metrics[name].mean
        assert mean is not None
        return mean


@dataclass
class Inputs:
    """runs: each once, in the order given. problems: what could not be read or did not finish, in words."""

    runs: list[Run] = field(default_factory=list)
    targets: list[Evaluated] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Everything under the paths: run directories, sweeps, and eval.json files or their directories.

    Raises UserError where a path does not exist, or nothing at all could be read.
    """
    found, seen = Inputs(), set[Path]()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such run directory, sweep or eval.json")
        if path.is_file():
            _read_evaluation(path, found)
        elif (path / MANIFEST).is_file():
            _read_sweep(path, found, seen)
        elif (path / EVALUATION).is_file():
            _read_evaluation(path / EVALUATION, found)
        elif has_anything_of_a_run(path):
            _read_run(path, found, seen)
        else:
            inside = [one for one in sorted(path.iterdir()) if one.is_dir() and has_anything_of_a_run(one)]
            for one in inside:
                _read_run(one, found, seen)
            if not inside:
                found.problems.append(
                    f"{path}: not a run, and there is none in it; a run has config.yaml and eval.jsonl"
                )
    names = [run.name for run in found.runs]
    for run in found.runs:
        if names.count(run.directory.resolve().name) > 1:  # such as seed-0 of two sweeps
            run.alias = f"{run.directory.resolve().parent.name}/{run.directory.resolve().name}"
    if not found.runs and not found.targets:
        told = "; ".join(found.problems[:3])
        raise UserError(f"{', '.join(map(str, paths))}: no runs found{': ' + told if told else ''}")
    return found


def has_anything_of_a_run(path: Path) -> bool:
    """Whether there is any of the files of a run, though config.yaml, which makes a directory a run, may be gone."""
    return any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "samples"))


def _read_run(path: Path, found: Inputs, seen: set[Path]) -> None:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    if trains_reward(path):
        found.problems.append(f"{path}: trains a reward, which has a page of its own: draftplus report {path}")
        return
    try:
        run = read_run(path)
    except (UserError, OSError) as error:
        found.problems.append(str(error))
        return
    found.problems += [f"{run.name}: {item}" for item in run.missing]
    if not run.config or not (run.steps or run.evaluations):
        found.problems.append(f"{run.name}: left out of the comparison: its configuration or its numbers are missing")
        return
    found.runs.append(run)


def _read_sweep(path: Path, found: Inputs, seen: set[Path]) -> None:
    """The runs that the manifest names, else every run in the directory."""
    try:
        told = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        entries = [(str(run["name"]), str(run["status"]), run.get("error")) for run in told["runs"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found.problems.append(f"{path / MANIFEST}: not a sweep's manifest; every run in the directory is used instead")
        entries = [(one.name, "finished", None) for one in sorted(path.iterdir()) if has_anything_of_a_run(one)]
    for name, status, error in entries:
        if status != "finished":
            found.problems.append(f"{name}: {status}{': ' + str(error) if error else ''}")
        if has_anything_of_a_run(path / name):
            _read_run(path / name, found, seen)
        elif status == "finished":
            found.problems.append(f"{name}: its run directory is missing")


def _read_evaluation(path: Path, found: Inputs) -> None:
    try:
        told = loads(path.read_text(encoding="utf-8"))
        prompts = tuple(map(str, told.get("prompts") or ()))
        images = len(told["seeds"]) // len(prompts) if prompts else None
        model = json.dumps(told["model"]) if "model" in told else None
        rows = [read_target(one) for one in told["targets"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found.problems.append(f"{path}: not what draftplus evaluate writes; left out")
        return
    for row in rows:
        known = {name: m for name, m in row.metrics.items() if m.mean is not None and math.isfinite(m.mean)}
        found.targets.append(Evaluated(row.label, str(path), known, row.step, prompts, model, images))
        bad = [name for name in row.metrics if name not in known]
        if bad:
            found.problems.append(f"{path}: {row.label}: {', '.join(bad)} not finite")
