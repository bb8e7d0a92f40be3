"""The index of packed prompts: their text beside the shards, mapped into memory, so that a million start at once.

A line of JSON, then the places where the prompts begin as 64-bit numbers, then their text in UTF-8. The shards stay
what counts: an index that does not fit them is not used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from draftplus.data.formats import TARS
from draftplus.errors import notice

INDEX = "prompts.index"
FORMAT = 1
ALIGNED = 8  # bytes of a number; the numbers begin at a multiple


class Shard(NamedTuple):
    """A tar file as it was written: its name, bytes, and SHA-256."""

    name: str
    size: int
    sha256: str


class Packed(Sequence[str]):
    """Prompts of an index, decoded as they are asked for. starts: where each begins in the text, and the end."""

    def __init__(self, starts: memoryview, text: memoryview) -> None:
        self._starts, self._text = starts, text

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        place = range(len(self))[at]  # IndexError outside, as a list
        return str(self._text[self._starts[place] : self._starts[place + 1]], "utf-8")


class Some(Sequence[str]):
    """Some prompts of others, by their places there."""

    def __init__(self, others: Sequence[str], places: NDArray[np.int64]) -> None:
        self._others, self._places = others, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self._others[i] for i in self._places[at]]
        return self._others[self._places[at]]


def write_index(directory: Path, train: Sequence[str], held_out: Sequence[str], shards: Iterable[Shard]) -> None:
    """Writes the index of shards that are in a directory already."""
    text, lengths = bytearray(), array("q", [0])
    for prompt in chain(train, held_out):
        encoded = prompt.encode()
        text += encoded
        lengths.append(len(encoded))
    starts = array("q", accumulate(lengths)).tobytes()
    body = hashlib.sha256(starts)
    body.update(text)
    told = {
        "format": FORMAT, "byteorder": sys.byteorder, "train": len(train), "held_out": len(held_out),
        "sha256": body.hexdigest(),
        "shards": [{**shard._asdict(), "changed": (directory / shard.name).stat().st_mtime_ns} for shard in shards],
    }  # fmt: skip
    header = json.dumps(told).encode()
    header += b" " * (-(len(header) + 1) % ALIGNED) + b"\n"
    with (directory / INDEX).open("wb") as file:
        for part in (header, starts, text):
            file.write(part)


def read_index(source: str | Path) -> tuple[Packed, Packed] | None:
    """The prompts to train on and the held-out ones of a packed directory; None for any other source.

    None, too, where the index is damaged or does not fit the shards, which is said; these are to be read instead.
    """
    directory = Path(source).expanduser()
    file = directory / INDEX
    if not file.is_file():
        return None
    try:
        header, starts, text = _mapped(file)
        differs = _difference(directory, header["shards"])
        split = header["train"]
        found = Packed(starts[: split + 1], text), Packed(starts[split:], text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        differs = f"it is damaged ({str(error) or type(error).__name__})"
    if differs is None:
        return found
    notice(f"{file} is not used: {differs}; all shards are read instead, which takes longer. To mend it, pack again")
    return None


def _mapped(file: Path) -> tuple[dict[str, Any], memoryview, memoryview]:
    """The header, the places and the text. Raises ValueError and others for what `write_index` did not write."""
    with file.open("rb") as opened:
        header = json.loads(opened.readline())
        begin = opened.tell()
        whole = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    if (header["format"], header["byteorder"]) != (FORMAT, sys.byteorder):
        raise ValueError("written by another version or kind of machine")
    if hashlib.sha256(whole[begin:]).hexdigest() != header["sha256"]:
        raise ValueError("it does not match its checksum")
    end = begin + ALIGNED * (header["train"] + header["held_out"] + 1)
    return header, whole[begin:end].cast("q"), whole[end:]


def _difference(directory: Path, shards: Sequence[dict[str, Any]]) -> str | None:
    """What is other than when the index was written; None for nothing."""
    there = {one.name for one in directory.iterdir() if one.name.lower().endswith(TARS)}
    if other := there ^ {shard["name"] for shard in shards}:
        return f"{min(other)} was {'added' if min(other) in there else 'removed'}"
    for shard in shards:
        path = directory / shard["name"]
        state = path.stat()
        same = state.st_size == shard["size"]
        if same and state.st_mtime_ns != shard["changed"]:  # copied, perhaps
            with path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
        if not same:
            return f"{shard['name']} was changed"
    return None
