"""What a run writes as it goes: rows of JSON, and the same numbers to TensorBoard and the like."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftplus.config import choices_of
from draftplus.errors import UserError
from draftplus.runs.files import disk_errors, write_text
from draftplus.runs.rows import ill_formed

Row = dict[str, Any]
Logger = Callable[[Mapping[str, float], int], None]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl file; a last line that a killed process left torn is dropped.

    Raises UserError for a line that is damaged.
    """
    if not path.is_file():
        return []
    rows = []
    *lines, torn = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, torn], 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            if number <= len(lines):
                raise _damaged(path, number, "is not JSON") from None
            continue
        if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
            raise _damaged(path, number, "is not a row with a step")
        rows.append(row)
    return rows


def read_evaluations(path: Path) -> list[Row]:
    """The rows of eval.jsonl, every value of the kind that a run writes. Raises UserError as `read_rows` does."""
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if bad := ill_formed(row):
            raise _damaged(path, number, f"has a {bad[0]} that no run writes")
    return rows


def _damaged(path: Path, number: int, what: str) -> UserError:
    return UserError(f"{path}: line {number} {what}, so it is damaged; put back a copy, or remove that line")


def append_row(path: Path, row: Row) -> None:
    """Adds a row; numbers that are not finite become null.

    Raises UserError where the disk is full.
    """
    line = json.dumps(finite(row), allow_nan=False) + "\n"
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


def finite(value: Any) -> Any:
    """The value, with every number in it that is not finite replaced by null."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows past a restored step."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def replace_row(path: Path, row: Row) -> None:
    """Puts a row in the place of the one with its step; the file is whole at any time."""
    rows = [row if old["step"] == row["step"] else old for old in read_rows(path)]
    write_text(path, "".join(json.dumps(finite(one), allow_nan=False) + "\n" for one in rows))


def open_loggers(names: Sequence[str], run: Path, config: Mapping[str, Any], step: int) -> list[Logger]:
    """Functions that log a row of numbers at a step.

    Raises UserError for an unknown logger, or one whose package is not installed.
    """
    return [_open(name, run, config, step) for name in names]


def _open(name: str, run: Path, config: Mapping[str, Any], step: int) -> Logger:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)  # hides what lies at that step too

        def log(row: Mapping[str, float], at: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, at)
            writer.flush()

        return log
    if name in ("wandb", "trackio"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"log.to names {name}, which is not installed; run: pip install draftplus[{name}]"
            ) from None
        from draftplus import rng

        # wandb continues the run of an id; trackio the one of a name
        identity = {"id": f"{run.name}-{rng.address(0, str(run.resolve())):x}"} if name == "wandb" else {}
        module.init(project="draftplus", name=run.name, config=dict(config), resume="allow", **identity)
        return lambda row, at: module.log(dict(row), step=at)
    raise UserError(f"log.to: unknown logger '{name}'; choose {', '.join(choices_of('log.to'))}")
