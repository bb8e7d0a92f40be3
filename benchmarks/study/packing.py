"""A study's numbers in one small file, which its tables can be made from elsewhere."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.study.plan import DONE
from benchmarks.study.train import MEASURES

NEEDED = ("config.yaml", "eval.jsonl", "metrics.jsonl", MEASURES, DONE)


def pack(directory: Path, target: Path, digits: int | None = None) -> int:
    """Writes what the tables need of each finished run below `directory`. Returns how many runs there are.

    target: a .tar.gz, or a .tar.xz, which is smaller. digits: how many of each measured number are kept; None: all.
    """
    runs = sorted(path.parent for path in directory.glob(f"*/*/{DONE}"))
    building = target.with_name(f".{target.name}")
    building.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(building, "w:xz" if target.suffix == ".xz" else "w:gz") as archive:
        for name in NEEDED:  # files of a kind side by side, which makes them small
            for file in (run / name for run in runs if (run / name).is_file()):
                member = tarfile.TarInfo(str(file.relative_to(directory)))
                content = file.read_bytes() if digits is None else _rounded(file, digits)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    building.replace(target)
    return len(runs)


def _rounded(file: Path, digits: int) -> bytes:
    if file.suffix != ".jsonl":
        return file.read_bytes()
    rows = [_shorter(json.loads(line), digits) for line in file.read_text(encoding="utf-8").splitlines()]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def _shorter(told: Any, digits: int) -> Any:
    if isinstance(told, dict):
        return {key: _shorter(value, digits) for key, value in told.items()}
    if isinstance(told, list):
        return [_shorter(value, digits) for value in told]
    return float(f"{told:.{digits}g}") if isinstance(told, float) else told


def unpack(source: Path, directory: Path) -> None:
    """Puts packed runs below `directory`; a run that is finished there stays as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            run = (directory / member.name).parent
            if member.name.endswith(tuple(f"/{name}" for name in NEEDED)) and not (run / DONE).is_file():
                archive.extract(member, directory, filter="data")


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """The directory of a study, or of what was packed of it."""
    if source.is_dir():
        yield source
        return
    with TemporaryDirectory() as directory:
        unpack(source, Path(directory))
        yield Path(directory)
