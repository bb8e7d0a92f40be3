"""Writes a report: the page of one run, or the comparison of several with its figures beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from draftplus.config import trains_reward
from draftplus.errors import UserError
from draftplus.report import comparison, page, pairs
from draftplus.report.inputs import has_anything_of_a_run, read_inputs
from draftplus.report.read import read_run

FIGURES = "figures"


def write_report(inputs: Path | Sequence[Path], output: Path | None = None, figures: bool | None = None) -> Path:
    """Writes the report and returns its path.

    inputs: a run gives the page of that run, also one that trains a reward; a sweep, or several runs, sweeps and
    eval.json files give the page that compares them. output: null means report.html in the one directory that was
    given, else in the working directory.
    figures: whether the figures are also written as PNG and SVG, to the folder `figures` beside the page; null means of
    a comparison only. Whatever an input lacks is named in the page.

    Raises UserError where an input does not exist, nothing of a run is found, or the page cannot be written.
    """
    paths = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(one) for one in inputs]
    if not paths:
        raise UserError("nothing to report on; name a run or a sweep")
    at = Path(output) if output is not None else _beside(paths) / "report.html"
    if at.is_dir():
        raise UserError(f"the output '{at}' is a directory; give a file name, such as {at / 'report.html'}")
    if at.exists() and not at.is_file():
        raise UserError(f"the output '{at}' is a device, pipe or socket; give the name of a file")
    single = len(paths) == 1 and has_anything_of_a_run(paths[0])
    if single and trains_reward(paths[0]):
        text, drawings = pairs.render(pairs.read_training(paths[0])), None
    elif single:
        run = read_run(paths[0])
        text = page.render(run)
        drawings = comparison.Report([run], [], [], run.name) if figures and run.config else None
    else:
        found = read_inputs(paths)
        drawings = comparison.Report(found.runs, found.targets, found.problems, _title(paths, at))
        text = drawings.render(at.parent)
    try:
        if drawings is not None and figures is not False:
            drawings.save(at.parent / FIGURES)
        _write(at, text)
    except OSError as error:
        raise UserError(f"{at}: the report cannot be written: {error.strerror or error}") from None
    return at


def _beside(paths: Sequence[Path]) -> Path:
    if len(paths) > 1:
        return Path()
    return paths[0] if paths[0].is_dir() or not paths[0].exists() else paths[0].parent


def _title(paths: Sequence[Path], at: Path) -> str:
    return paths[0].resolve().name if len(paths) == 1 else at.resolve().parent.name


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
