"""Where the pictures of pairs lie, how one is read, and by what it is seen whether they are still the same."""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from draftplus.data.parquet_pages import Column
from draftplus.data.pictures import Undecodable
from draftplus.errors import UserError

MOST_COPIED = 4_000_000_000  # bytes of pictures, and of a compressed archive
BLOCK = 4096  # bytes of a picture's file that are looked at in one place
PLACES, MOST_PLACES, LARGE = 3, 16, 16 << 20  # in how many places at least and at most, and one more for so many bytes
THREADS, AT_A_TIME = 8, 1000


class Extent(NamedTuple):
    """Bytes of a file. size: None for the whole file. file: a name, or what is open already."""

    file: str | IO[bytes]
    start: int = 0
    size: int | None = None


class Place(Protocol):
    """A picture."""

    def read(self) -> bytes:
        """Its encoded bytes. Raises Undecodable where they are not to be had."""
        ...

    @property
    def extent(self) -> Extent:
        """The bytes on the disk which it is in, maybe with others."""
        ...


class InFile(NamedTuple):
    """A picture that is a file, or bytes in one. size: None for the whole file."""

    file: str
    start: int = 0
    size: int | None = None

    def read(self) -> bytes:
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                return file.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise Undecodable(f"{self.file}: {error.strerror or error}") from None

    @property
    def extent(self) -> Extent:
        return Extent(*self)


class InCopy(NamedTuple):
    """A picture in the temporary file."""

    copy: IO[bytes]
    start: int
    size: int

    def read(self) -> bytes:
        return os.pread(self.copy.fileno(), self.size, self.start)

    @property
    def extent(self) -> Extent:
        return Extent(*self)


class InParquet(NamedTuple):
    """A picture in a row of a parquet file's row group."""

    column: Column
    row: int

    def read(self) -> bytes:
        try:
            found = self.column.value(self.row)
        except Exception as error:  # pyarrow's too, of which some are OSError and ValueError
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise Undecodable(f"{self.column.file}: damaged ({reason})") from None
        if found is None:
            raise Undecodable(f"there is no {self.column.name}")
        return found

    @property
    def extent(self) -> Extent:
        return Extent(self.column.file, self.column.start, self.column.size)


class Copies:
    """The temporary file of pictures that come out of compressed archives; it is gone with the process."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._archives = 0

    def begin(self, archive: Path) -> None:
        """UserError for an archive that is too large to be copied."""
        self._archives += archive.stat().st_size
        if self._archives > MOST_COPIED:
            self._refuse(archive)

    def add(self, data: bytes, archive: Path) -> InCopy:
        """Keeps a picture. UserError where there is no room."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="draftplus-pairs-")  # noqa: SIM115  # lives as its places
            place = InCopy(self._file, self._file.tell(), len(data))
            self._file.write(data)
        except OSError as error:
            raise self._no_room(error, archive) from None
        if place.start + place.size > MOST_COPIED:
            self._refuse(archive)
        return place

    def flush(self, archive: Path) -> None:
        """Before pictures are read. UserError where there is no room."""
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            raise self._no_room(error, archive) from None

    @staticmethod
    def _no_room(error: OSError, archive: Path) -> UserError:
        return UserError(
            f"the pictures of '{archive}' cannot be copied to {tempfile.gettempdir()}: {error.strerror or error}; "
            "set TMPDIR to a directory with more room"
        )

    @staticmethod
    def _refuse(archive: Path) -> None:
        raise UserError(
            f"'{archive}' is compressed, so that its pictures cannot be read where they are, and each process would "
            f"copy more than {MOST_COPIED / 1e9:g} GB of such archives to {tempfile.gettempdir()};\n"
            f"unpack it once, by gunzip '{archive}', and give the .tar, which is read in place"
        )


def contents_hash(places: Iterable[Place], advance: Callable[[int, str], None] = lambda done, note: None) -> str:
    """The SHA-256 of how large pictures are and of some of their bytes: of a picture up to 12 KiB all, of a larger one
    4 KiB each at its beginning, middle and end. Of parquet, pictures that lie together count as one, and up to 16
    places in it are looked at. Neither names nor times of change matter.

    So a hundred thousand pictures need not be read to see that one was drawn anew; a change of single pixels of a file
    without compression may be missed. advance: called with the number of extents that are done.
    """
    known: dict[Extent, int] = {}
    which = array(
        "q", (known.setdefault(place.extent, len(known)) for place in places)
    )  # a picture may be in two pairs
    whole, done, extents = hashlib.sha256(which.tobytes()), 0, iter(known)
    with ThreadPoolExecutor(THREADS, "checking") as pool:
        while some := list(islice(extents, AT_A_TIME)):
            for told in pool.map(_mark, some):
                whole.update(told)
            done += len(some)
            advance(done, "")
    return whole.hexdigest()


def _mark(extent: Extent) -> bytes:
    if not isinstance(extent.file, str):
        return _mark_of(extent.file.fileno(), extent.start, extent.size)
    try:
        file = os.open(extent.file, os.O_RDONLY)
    except OSError:
        return b"absent"
    try:
        return _mark_of(file, extent.start, extent.size)
    except OSError:  # a directory, say
        return b"unreadable"
    finally:
        os.close(file)


def _mark_of(file: int, start: int, size: int | None) -> bytes:
    size = os.fstat(file).st_size if size is None else size
    told = hashlib.blake2b(str(size).encode(), digest_size=16)
    for at, length in _looked_at(size):
        told.update(os.pread(file, length, start + at))
    return told.digest()


def _looked_at(size: int) -> Iterator[tuple[int, int]]:
    count = min(PLACES + size // LARGE, MOST_PLACES)
    if size <= count * BLOCK:
        yield 0, size
        return
    for number in range(count):
        yield (size - BLOCK) * number // (count - 1), BLOCK
