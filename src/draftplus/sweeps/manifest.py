"""What a sweep directory says of its runs: manifest.json, always whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftplus import __version__
from draftplus.errors import UserError
from draftplus.runs.files import write_text

FILE = "manifest.json"
STATUSES = ("pending", "running", "finished", "failed", "interrupted")


@dataclass
class Entry:
    """One run. status: one of STATUSES. error: what a failed one said. seconds: of all its attempts together."""

    name: str
    settings: list[str]
    status: str = "pending"
    error: str | None = None
    seconds: float = 0.0


@dataclass
class Manifest:
    """A sweep: the recipe under every run, the grid as it was written, and the runs in their order."""

    recipe: str
    grid: dict[str, list[str]]
    runs: list[Entry] = field(default_factory=list)

    def with_status(self, *statuses: str) -> Iterator[Entry]:
        """The runs of these statuses."""
        return (entry for entry in self.runs if entry.status in statuses)

    def save(self, directory: Path) -> None:
        """Writes manifest.json, whole or not at all."""
        told = {"draftplus": __version__, "name": directory.name, **asdict(self)}
        write_text(directory / FILE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a sweep directory; None where it has none.

    Raises UserError for one that cannot be read.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        entries = [Entry(**{key: run[key] for key in Entry.__dataclass_fields__}) for run in told["runs"]]
        return Manifest(told["recipe"], told["grid"], entries)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a sweep's manifest; remove the file to continue the runs") from None
