"""Pictures on disk: files, directories and tar archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from torch import Tensor

from draftplus.data.formats import DAMAGED_TAR, TARS, members
from draftplus.data.pictures import MOST_BYTES, SUFFIXES, Undecodable, decode
from draftplus.data.text import decoded
from draftplus.errors import UserError

LONGEST_CAPTION = 100_000  # bytes


@dataclass(frozen=True)
class Stored:
    """A picture on disk. name: below the target that it is from. file: its own, or that of the tar whose `member` it
    is. caption: of the .txt beside it, None where there is none."""

    name: str
    file: Path
    member: str | None = None
    caption: str | None = None

    def __str__(self) -> str:
        return str(self.file) if self.member is None else f"{self.file}/{self.member}"


def find_pictures(targets: Sequence[str | Path]) -> list[Stored]:
    """The pictures of files, directories (with all below them, by name, numbers by their value) and tar archives (in
    their order), each once; hidden ones are left out.

    Raises UserError for a target that is missing, has no picture, or is a tar that is cut short or damaged.
    """
    found: dict[str, Stored] = {}
    for target in targets:
        path = Path(target).expanduser()
        if path.is_dir():
            pictures = [_beside(one, path) for one in sorted(_below(path), key=lambda one: _by_number(one, path))]
        elif not path.is_file():
            raise UserError(f"'{target}': no such picture, directory or .tar file")
        elif path.name.lower().endswith(TARS):
            pictures = _inside(path)
        else:
            pictures = [_beside(path, path.parent)]
        if not pictures:
            raise UserError(f"'{target}' has no pictures; they end in {', '.join(SUFFIXES)}")
        for picture in pictures:
            found.setdefault(str(picture), picture)
    return list(found.values())


def _below(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if _is_picture(path.relative_to(directory).as_posix()) and path.is_file():
            yield path


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def _by_number(path: Path, directory: Path) -> list[tuple[bool, int, str]]:
    """2.png before 10.png: a list of prompts in the order of the pictures means it so."""
    parts = re.split(r"(\d+)", path.relative_to(directory).as_posix())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _beside(picture: Path, directory: Path) -> Stored:
    sidecar, caption = picture.with_suffix(".txt"), None
    if sidecar.is_file() and sidecar != picture:
        caption = _caption(sidecar.read_bytes, sidecar.stat().st_size, str(sidecar))
    return Stored(picture.relative_to(directory).as_posix(), picture, None, caption)


def _caption(read: Callable[[], bytes], size: int, where: str) -> str:
    if size > LONGEST_CAPTION:
        raise UserError(f"{where} has {size:,} bytes, so it is no caption of a picture; remove or rename it")
    return " ".join(decoded(read(), where).split())


def _inside(path: Path) -> list[Stored]:
    pictures, captions = [], {}
    with _whole(path):
        for member, read in members(path):
            key, _, suffix = member.name.rpartition(".")
            if not member.isreg():  # no link is followed
                continue
            if suffix.lower() == "txt":
                captions[key] = _caption(read, member.size, f"{path}, member {member.name}")
            elif _is_picture(member.name):
                pictures.append(member.name)
    for name, count in Counter(pictures).items():
        if count > 1:
            raise UserError(f"'{path}' has {count} members named {name}; rename or remove all but one")
    return [Stored(name, path, name, captions.get(name.rpartition(".")[0])) for name in pictures]


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Raises UserError for an archive that is cut short or damaged."""
    try:
        yield
    except DAMAGED_TAR as error:
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar file ({reason}); download or create it again") from error


def read_pictures(pictures: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor | Undecodable]]:
    """Each picture as (3, H, W) uint8, or why it is not read; those of a tar in its order."""
    for path, group in groupby(pictures, key=lambda one: one.file):
        wanted = {one.member: one for one in group}
        if None in wanted:
            yield wanted[None], _file(path)
            continue
        with _whole(path):
            for member, read in members(path):
                if member.isreg() and member.name in wanted:
                    yield wanted[member.name], _decoded(read, member.size)


def _file(path: Path) -> Tensor | Undecodable:
    try:
        return _decoded(path.read_bytes, path.stat().st_size)
    except OSError as error:
        return Undecodable(error.strerror or str(error))


def _decoded(read: Callable[[], bytes], size: int) -> Tensor | Undecodable:
    if size > MOST_BYTES:
        return Undecodable(f"{size:,} bytes, more than {MOST_BYTES:,}")
    try:
        return decode(read())
    except Undecodable as error:
        return error
