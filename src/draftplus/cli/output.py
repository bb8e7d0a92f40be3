"""Where `generate` and `evaluate` write if no directory is named: after the target and what was asked of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORD = "command.json"  # what a directory was made by


def knobs(settings: Sequence[str], **options: Any) -> dict[str, str]:
    """What is not at its default, as text by key: options as given, and `key=value` settings."""
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    texts = {name: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for name, v in given.items()}
    return {**texts, **dict(text.split("=", 1) for text in settings if "=" in text)}


def output_directory(parent: str, name: str, knobs: Mapping[str, str], asked: Mapping[str, Any], result: str) -> Path:
    """`parent`/NAME for the defaults, else `parent`/NAME_knob-value, so that no result takes another's place.

    asked: everything that the command was asked. A directory with a result of something else stays, and this one's
    name ends in a hash. result: the file of a finished result.
    """
    from draftplus.sweeps.grid import bounded, names

    told = f"{name}_{names([dict(knobs)])[0]}" if knobs else name
    directory = Path(parent) / bounded(told, dict(knobs))
    if (directory / result).exists() and _record(directory) != _plain(asked):
        digest = hashlib.sha256(json.dumps(_plain(asked), sort_keys=True).encode()).hexdigest()[:8]
        directory = directory.with_name(f"{directory.name}-{digest}")
    return directory


def record(directory: Path, asked: Mapping[str, Any]) -> None:
    """Notes what a directory was made by, once its result is there."""
    from draftplus.runs.files import write_text

    write_text(directory / RECORD, json.dumps(_plain(asked), indent=1, ensure_ascii=False) + "\n")


def _plain(asked: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(asked, default=str))


def _record(directory: Path) -> Any:
    try:
        return json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
