"""Writing prompts as tar shards, in a directory that appears only once it is complete."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftplus.data.index import Shard, write_index
from draftplus.errors import UserError

SUMMARY = "pack.json"
_EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # a header without a name, of a file without content
_REST = sum(_EMPTY) - sum(_EMPTY[124:135]) - sum(_EMPTY[148:156]) + 8 * ord(" ")  # of the sum that a header holds
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_names(output: str | Path) -> tuple[Path, list[str] | None]:
    """The directory of an output, and the names of its shards in order; None: as many as the prompts need.

    UserError for a name that is neither a directory's nor a range of .tar files in one.
    """
    path = Path(output).expanduser()
    ranges = _RANGE.findall(path.name)
    if not ranges and "{" not in path.name and path.suffix != ".tar":
        return path, None
    if len(ranges) != 1 or len({len(end) for end in ranges[0]}) != 1 or path.suffix != ".tar" or path.parent == Path():
        raise UserError(
            f"output '{output}': give a directory of its own, or one range of equally long numbers in one, such as "
            "prompts/{00000..00015}.tar"
        )
    begin, end = map(int, ranges[0])
    numbers = [f"{number:0{len(ranges[0][0])}}" for number in range(min(begin, end), max(begin, end) + 1)]
    return path.parent, [_RANGE.sub(number, path.name) for number in numbers]


def refuse_target(directory: Path, overwrite: bool) -> None:
    """UserError for a directory that is there, unless it holds nothing, or packed prompts that may be replaced."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise UserError(f"output '{directory}' is not a directory; name another one")
    above = next(one for one in directory.absolute().parents if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):  # before hours of reading
        raise UserError(f"output '{directory}' cannot be made: {above} cannot be written to; name another one")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not overwrite:
        raise UserError(f"output '{directory}' is there already; name another one, or add --overwrite")
    if not (directory / SUMMARY).is_file():
        raise UserError(f"output '{directory}' holds something else than packed prompts; name another one")


def write_shards(
    directory: Path, names: Sequence[str] | None, train: Sequence[str], held_out: Sequence[str], size: int,
    summary: Mapping[str, Any], advance: Callable[[int, str], None],
) -> None:  # fmt: skip
    """Writes a directory of shards with their index and summary. names: of the shards; None: `size` prompts in each.

    Raises UserError where there are more names than prompts, or the directory cannot be made.
    """
    names = names or [f"{number:05d}.tar" for number in range(-(-len(train) // size))]
    if len(names) > len(train):
        raise UserError(f"{len(names):,} shards for {len(train):,} prompts: name fewer shards")
    bounds = [len(train) * number // len(names) for number in range(len(names) + 1)]
    shards, done = [], itertools.count(1)
    with _whole(directory) as building:
        for name, (begin, end) in zip(names, itertools.pairwise(bounds), strict=True):
            lone = end - begin == 1 and "\n" in train[begin]  # would be taken for a list of prompts
            members = (_member(number, train[number], "train" if lone else None) for number in range(begin, end))
            shards.append(_write(building / name, members, done, advance))
        if held_out:
            numbered = enumerate(held_out, len(train))
            members = (_member(number, prompt, "held_out") for number, prompt in numbered)
            shards.append(_write(building / _held_out_name(names[0]), members, done, advance))
        (building / SUMMARY).write_text(
            json.dumps({**summary, "shards": [shard.name for shard in shards]}, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        write_index(building, train, held_out, shards)


def _held_out_name(first: str) -> str:
    """A name that is sorted behind those of the range that `first` begins."""
    return re.sub(r"\d+(?!.*\d)", "held_out", first)


def _member(number: int, prompt: str, split: str | None) -> tuple[str, bytes]:
    if split is None:
        return f"{number:09d}.txt", prompt.encode()
    return f"{number:09d}.json", json.dumps({"prompt": prompt, "split": split}, ensure_ascii=False).encode()


def _write(
    path: Path, members: Iterator[tuple[str, bytes]], done: Iterator[int], advance: Callable[[int, str], None]
) -> Shard:
    hashed, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(data: bytes) -> None:
            nonlocal size
            hashed.update(data)
            size += file.write(data)

        for name, data in members:
            put(_header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
            written = next(done)
            if written % 1000 == 0:
                advance(written, "")
        put(bytes(2 * tarfile.BLOCKSIZE + -(size + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE))
    return Shard(path.name, size, hashed.hexdigest())


def _header(name: str, size: int) -> bytes:
    """What `TarInfo.tobuf` gives for a short name, without the tenfold time that it takes."""
    called, length = name.encode(), b"%011o" % size
    told = _REST + sum(called) + sum(length)
    return b"".join((called, _EMPTY[len(called) : 124], length, _EMPTY[135:148], b"%06o\0 " % told, _EMPTY[156:]))


@contextmanager
def _whole(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes the other's place once it is complete."""
    building, old = (directory.with_name(f".{directory.name}.{what}") for what in ("building", "old"))
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output '{directory}' cannot be made ({error.strerror}); name another one") from None
    try:
        yield building
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        building.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
