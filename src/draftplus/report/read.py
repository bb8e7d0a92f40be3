"""Reads a run directory as far as it got: what is absent is named, and the rest is still reported."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from PIL import Image

from draftplus.config import Config, with_new_names
from draftplus.errors import UserError
from draftplus.runs.directory import is_held
from draftplus.runs.origin import edited, read_origin
from draftplus.runs.rows import EvaluationRow, are_numbers, ill_formed, read_evaluation

LARGEST = 1e30  # that matplotlib can place
STEP_DIRECTORY = re.compile(r"step-(\d+)")
SAMPLE_FILE = re.compile(r"(?P<prompt>\d+)-.*-(?P<seed>\d+)\.png")


@dataclass
class Run:
    """What a run directory holds.

    steps: the rows of metrics.jsonl. evaluations: those of eval.jsonl. samples: by step, the picture of each
    (prompt index, seed). last_sigma: the noise level of the last sampling step, where it is known. best, stopped:
    best.json, and stopped.json of a run that a guard ended. missing: what was not there, in words. running: whether a
    process is training in it.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[EvaluationRow] = field(default_factory=list)
    samples: dict[int, dict[tuple[int, int], Path]] = field(default_factory=dict)
    grids: dict[int, Path] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    last_sigma: float | None = None
    best: dict[str, Any] = field(default_factory=dict)
    stopped: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    running: bool = False
    alias: str = ""

    @property
    def name(self) -> str:
        """The directory's name, with that of the directory above where two runs of a report share it."""
        return self.alias or self.directory.resolve().name


def read_run(directory: Path) -> Run:
    """What is in a run directory.

    Raises UserError where the directory does not exist or holds nothing of a run.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory")
    run = Run(directory, running=is_held(directory))
    run.config, run.last_sigma = _read_config(run), _last_sigma(directory)
    run.steps = read_rows(run, "metrics.jsonl", "no training curves", not_numbers)
    evaluated = read_rows(run, "eval.jsonl", "no held-out numbers", ill_formed)
    run.evaluations = [read_evaluation(row) for row in evaluated]
    _read_samples(run)
    run.best = read_object(run, "best.json")
    run.stopped = read_object(run, "stopped.json")
    if not (run.config or run.steps or run.evaluations or run.samples or run.grids):
        raise UserError(
            f"{directory}: not a run directory; it has no config.yaml, metrics.jsonl, eval.jsonl or samples/"
        )
    return run


def _read_config(run: Run) -> dict[str, Any]:
    path = run.directory / "config.yaml"
    if not path.is_file():
        run.missing.append("config.yaml (no configuration)")
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's errors share no base class with OmegaConf's
        run.missing.append(f"config.yaml (cannot be read: {str(error).splitlines()[0]})")
        return {}
    if not isinstance(config, dict):
        run.missing.append("config.yaml (not a configuration)")
        return {}
    try:
        changed = edited(run.directory)
    except UserError as error:
        run.missing.append(f"config.yaml ({error})")
        return {}
    run.missing += [
        f"config.yaml ({key} was {then}, is {now}: edited or damaged)" for key, (then, now) in changed.items()
    ]
    config = with_new_names(config)
    lacking = [field.name for field in dataclasses.fields(Config) if field.name not in config]
    if lacking:
        run.missing.append(f"config.yaml (incomplete: it lacks {', '.join(lacking)})")
        return {}
    try:
        OmegaConf.merge(OmegaConf.structured(Config), config)
    except (ConfigKeyError, ConfigAttributeError):
        pass  # of another version
    except OmegaConfBaseException as error:
        run.missing.append(f"config.yaml ({str(error).splitlines()[0]})")
        return {}
    return {str(key): value for key, value in config.items()}


def _last_sigma(directory: Path) -> float | None:
    try:
        origin = read_origin(directory)
    except UserError:  # which the configuration's part of the page tells
        return None
    return None if origin is None else origin.last_sigma


def loads(text: str) -> Any:
    """JSON, whose numbers that no figure could show are infinite."""
    return json.loads(text, parse_float=_shown, parse_int=lambda told: int(told) if len(told) < 20 else _shown(told))


def _shown(text: str) -> float:
    return number if abs(number := float(text)) < LARGEST else math.copysign(math.inf, number)


def not_numbers(row: Mapping[str, Any]) -> list[str]:
    return [key for key, value in row.items() if not are_numbers([value])]


def read_rows(
    run: Run, name: str, consequence: str, ill_formed: Callable[[Mapping[str, Any]], Sequence[str]]
) -> list[dict[str, Any]]:
    """The rows in order of step; a step that was written twice counts as written last.

    ill_formed: the keys of a row whose values are not what a run writes there; they are named and left out.
    """
    path = run.directory / name
    rows: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        run.missing.append(f"{name} ({consequence})")
        return []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            run.missing.append(f"{name}, line {number} (not a row with a step)")
            continue
        bad = ill_formed(row)
        run.missing += [f"{name}, line {number}: {key} (not a value that a run writes)" for key in bad]
        rows[row["step"]] = {key: value for key, value in row.items() if key not in bad}
    if not rows:
        run.missing.append(f"{name} is empty ({consequence})")
    return [rows[step] for step in sorted(rows)]


def _read_samples(run: Run) -> None:
    root = run.directory / "samples"
    broken: list[Path] = []
    for directory in sorted(root.glob("step-*")):
        match = STEP_DIRECTORY.fullmatch(directory.name)
        if match is None:
            continue
        step = int(match[1])
        named = {path: m for path in sorted(directory.glob("*.png")) if (m := SAMPLE_FILE.fullmatch(path.name))}
        huge = {path for path in named if is_huge(path)}
        run.missing += [f"{path.relative_to(run.directory)} (a picture too large to be read)" for path in sorted(huge)]
        broken += [path for path in named if path not in huge and not is_whole(path)]
        left_out = {*huge, *broken}
        pictures = {(int(m["prompt"]), int(m["seed"])): path for path, m in named.items() if path not in left_out}
        if pictures:
            run.samples[step] = pictures
        grid = directory / "grid.png"
        if grid.is_file() and not is_huge(grid) and is_whole(grid):
            run.grids[step] = directory / "grid.png"
    if broken:
        first = broken[0].relative_to(run.directory)
        run.missing.append(f"{first}{f' and {len(broken) - 1} more' * (len(broken) > 1)} (incomplete PNG files)")
    if not run.samples and not run.grids:
        run.missing.append("samples/ (no pictures)")
        return
    prompts = read_json(run, "samples/prompts.json")
    if isinstance(prompts, list):
        run.prompts = [str(prompt) for prompt in prompts]
    else:
        run.missing.append("samples/prompts.json (prompts are shown by number)")


def is_huge(path: Path) -> bool:
    """Whether Pillow refuses a picture for its size, which may be an attack on the reader's memory."""
    try:
        with Image.open(path):
            return False
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def is_whole(path: Path) -> bool:
    """Whether a PNG file is all there, by its checksums; a copy or a write that broke off is not."""
    try:
        state = path.stat()
    except OSError:
        return False
    return _checked(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=100_000)  # a running job's report is written at every evaluation
def _checked(path: Path, size: int, changed: int) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
        with path.open("rb") as file:
            file.seek(max(0, size - 8))
            return file.read(4) == b"IEND"
    except (OSError, SyntaxError, ValueError):
        return False


def read_object(run: Run, name: str) -> dict[str, Any]:
    value = read_json(run, name)
    if isinstance(value, dict) and type(value.get("step")) is not int:
        run.missing.append(f"{name} (without a step)")
        return {}
    if isinstance(value, dict) or not (run.directory / name).is_file():
        return value or {}
    if value is not None or (run.directory / name).read_text(encoding="utf-8", errors="replace").strip() == "null":
        run.missing.append(f"{name} (not an object)")
    return {}


def read_json(run: Run, name: str) -> Any:
    path = run.directory / name
    if not path.is_file():
        return None
    try:
        return loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        run.missing.append(f"{name} (not JSON)")
        return None
