"""Some of the bytes of a compressed page, without the others.

pyarrow writes a thousand rows or more into one page, however long they are, so that a page of pictures may be hundreds
of megabytes. Snappy, which parquet files have by default, compresses 64 KiB at a time, none of which needs another
(google/snappy, format_description.txt and kBlockSize). So once it is known where these begin, few are decompressed.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from typing import Any, Protocol

BLOCK = 1 << 16  # bytes that Snappy compresses at a time
WINDOW, LONGEST = 4096, 5  # bytes that are read at a time to find its blocks; of an element without what it holds


class Damaged(Exception):
    """What is no page of a parquet file, where one should be."""


class Content(Protocol):
    """The decompressed bytes of a page, or of a part of it."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def read(self, file: int, at: int, size: int) -> memoryview:
        """Some of them, fewer at the end. file: the descriptor of the page's file."""
        ...


@dataclass(frozen=True)
class Uncompressed:
    """Bytes as they are in the file, from `start` on."""

    start: int
    size: int

    def read(self, file: int, at: int, size: int) -> memoryview:
        return memoryview(os.pread(file, max(0, min(size, self.size - at)), self.start + at))


@dataclass(frozen=True)
class Whole:
    """Bytes that were decompressed all at once."""

    data: memoryview

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, file: int, at: int, size: int) -> memoryview:
        return self.data[at : at + size]


@dataclass(frozen=True)
class Blocks:
    """What Snappy compressed. starts: where each block begins in the file, and the end."""

    starts: array[int]
    size: int

    def read(self, file: int, at: int, size: int) -> memoryview:
        end = min(at + size, self.size)
        if at >= end:
            return memoryview(b"")
        first, last = at // BLOCK, (end - 1) // BLOCK
        begin = first * BLOCK
        plain = min((last + 1) * BLOCK, self.size) - begin
        packed = os.pread(file, self.starts[last + 1] - self.starts[first], self.starts[first])
        return decompressed("snappy", _as_varint(plain) + packed, plain)[at - begin : end - begin]


def content(file: int, start: int, size: int, plain: int, codec: str | None) -> Content:
    """`size` bytes at `start` of a file, which are `plain` without their compression. codec: pyarrow's name of it.

    Raises Damaged, and what pyarrow raises.
    """
    if codec is None:
        return Uncompressed(start, size)
    if codec == "snappy" and plain > BLOCK:
        starts = _block_starts(file, start, size, plain)
        if starts is not None:
            return Blocks(starts, plain)
    data = os.pread(file, size, start)
    if len(data) < size:
        raise Damaged("it is cut short")
    return Whole(decompressed(codec, data, plain))


def decompressed(codec: str, data: bytes, size: int) -> memoryview:
    import pyarrow

    plain: Any = pyarrow.Codec(codec).decompress(data, size)
    return memoryview(plain).cast("B")  # pyarrow's bytes have signs


def _block_starts(file: int, start: int, size: int, plain: int) -> array[int] | None:
    """Where Snappy's blocks begin in a file; None where they are not independent of one another, as another program
    might write them."""
    starts, end, made = array("q"), start + size, 0
    window, begin = os.pread(file, WINDOW, start), start
    try:
        length, at = varint(window, 0)
        at += start
        if length != plain:
            raise Damaged("a page has another length than it says")
        while at < end:
            if at + LONGEST > begin + len(window):
                window, begin = os.pread(file, WINDOW, at), at
            within = made % BLOCK
            if within == 0:
                starts.append(at)
            length, back, at = _element(window, at - begin, at)
            if back > within or within + length > BLOCK:
                return None
            made += length
    except IndexError:
        raise Damaged("it is cut short") from None
    if made != plain or at != end:
        raise Damaged("a page has another length than it says")
    starts.append(end)
    return starts


def _element(data: bytes, i: int, at: int) -> tuple[int, int, int]:
    """How many bytes an element of Snappy makes, how far back it copies them from (0: they follow), and where the next
    one begins. i: its place in data. at: in the file."""
    tag = data[i]
    kind, length = tag & 3, (tag >> 2) + 1
    if kind == 0:
        more = max(0, length - 60)  # bytes of the length
        length = int.from_bytes(data[i + 1 : i + 1 + more], "little") + 1 if more else length
        return length, 0, at + 1 + more + length
    if kind == 1:
        return (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[i + 1], at + 2
    wide = 2 * (kind - 1)
    return length, int.from_bytes(data[i + 1 : i + 1 + wide], "little"), at + 1 + wide


def varint(data: Any, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends. IndexError: beyond the end of the data."""
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise Damaged("a number without end")


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
