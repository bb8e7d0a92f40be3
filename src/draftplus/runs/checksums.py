"""Checksums: of the files of a directory, beside them as `sha256sum -c` reads them, and of JSON inside itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftplus.models.files import file_hash

SUMS = "SHA256SUMS"
OWN = "sha256"
CHUNK = 10_000  # texts at a time


def write_sums(directory: Path) -> None:
    """Writes SHA256SUMS of all files of a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{files_hash(file)}  {file.relative_to(directory)}\n" for file in files]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(directory: Path) -> dict[str, str] | None:
    """What SHA256SUMS of a directory says of its files, by name; None where it has none."""
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    return {name: told for told, _, name in (line.partition("  ") for line in lines)}


def verify(directory: Path, only: str | None = None) -> None:
    """Raises ValueError that names a file which is not as it was written; files that were added are not looked at.

    only: the one file to look at, which may be among others that are not draftplus's. A directory without SHA256SUMS is
    of an earlier version, and passes.
    """
    written = read_sums(directory)
    if written is None:
        return
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    known = {name for name in there if name.endswith((".safetensors", ".json"))}
    for name in sorted(written.keys() | known if only is None else written.keys() & {only}):
        if name not in there:
            raise ValueError(f"{name} is missing")
        if files_hash(directory / name) != written.get(name):
            raise ValueError(f"{name} does not match its checksum")


def files_hash(path: Path) -> str:
    """The SHA-256 of a file, or of a directory's files with their names."""
    if not path.is_dir():
        return file_hash(path)
    return named_hash({str(file.relative_to(path)): file for file in _visible_files(path, frozenset())})


def named_hash(files: Mapping[str, Path]) -> str:
    """The SHA-256 of several files with names for them."""
    whole = hashlib.sha256()
    for name in sorted(files, key=lambda name: Path(name).parts):
        whole.update(f"{name} {files_hash(files[name])}\n".encode())
    return whole.hexdigest()


def _visible_files(directory: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The files below, also through links; a link to a directory that contains it is not followed."""
    above |= {directory.resolve()}
    for path in directory.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.resolve() not in above:
            yield from _visible_files(path, above)
        elif path.is_file() and not path.name.startswith(".") and path.name != SUMS:
            yield path


def text_hash(told: Any) -> str:
    """The SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def texts_hash(texts: Sequence[str]) -> str:
    """`text_hash` of a list of texts, without having all of them, or their JSON, in memory."""
    whole, comma = hashlib.sha256(b"["), b""
    for begin in range(0, len(texts), CHUNK):
        whole.update(comma + json.dumps(list(texts[begin : begin + CHUNK])).encode()[1:-1])
        comma = b", "
    whole.update(b"]")
    return whole.hexdigest()


def seal(told: Mapping[str, Any]) -> str:
    """JSON of an object, with its own checksum in it."""
    plain = json.loads(json.dumps(told))  # as it will be read
    return json.dumps({**plain, OWN: text_hash(plain)}, indent=1)


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given. Raises ValueError where the text is not what it wrote."""
    told = json.loads(text)
    if not isinstance(told, dict) or told.pop(OWN, None) != text_hash(told):
        raise ValueError("it does not match its checksum")
    return told
