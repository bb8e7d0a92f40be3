"""A study's numbers in one small file, which its tables can be made from elsewhere."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.study.plan import DONE
from benchmarks.study.train import MEASURES

NEEDED = ("config.yaml", "eval.jsonl", "metrics.jsonl", MEASURES, DONE)


def pack(directory: Path, target: Path) -> int:
    """Writes what the tables need of each finished run below `directory`. Returns how many runs there are."""
    runs = sorted(path.parent for path in directory.glob(f"*/*/{DONE}"))
    building = target.with_name(f".{target.name}")
    building.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(building, "w:gz") as archive:
        for run in runs:
            for file in (run / name for name in NEEDED if (run / name).is_file()):
                archive.add(file, str(file.relative_to(directory)))
    building.replace(target)
    return len(runs)


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
