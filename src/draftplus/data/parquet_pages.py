"""One value of a column of a parquet file, without reading those before it.

pyarrow reads a row group from its beginning, and a row group of pictures may be hundreds of megabytes. A column's part
of it is cut into pages, each behind a header (parquet's own, in Thrift's compact protocol) that says how long it is and
how many values it has. So the headers are walked once, and once in each page the lengths that stand before its values;
then one value is read. What is not read in this way (rare encodings) is read by pyarrow, from the row group's start.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from draftplus.data.page_bytes import Content, Damaged, Uncompressed, Whole, content, varint

DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # kinds of pages
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8  # encodings
HEADER = 4096  # bytes that are read for a header; if it is longer, more
LONGEST_HEADER = 1 << 24
WINDOW = 1 << 16  # bytes that are read at a time to walk short values
FEW = 8  # rows that pyarrow decodes at a time, where it has to

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


class Unknown(Exception):
    """A page that is not read here."""


class Page(NamedTuple):
    """start, size: of its content in the file, compressed. plain: the bytes that it has without compression.

    levels: bytes of repetition and definition levels that lie before the values, of a DATA_V2 page; None: they are
    inside. compressed: whether the values are.
    """

    kind: int
    start: int
    size: int
    plain: int
    values: int
    encoding: int
    levels: tuple[int, int] | None = None
    compressed: bool = True


@dataclass(eq=False)
class Column:
    """A column of byte strings in one row group.

    start, size: where it is in the file. codec: its compression, as pyarrow calls it; None for none. name: the path
    in the schema. levels: the largest definition level, that of values which are there. repeated: whether it is of
    lists.
    """

    file: str
    group: int
    name: str
    start: int
    size: int
    codec: str | None
    levels: int
    repeated: bool
    pages: list[Page] | None = field(default=None, repr=False)
    ends: list[int] = field(default_factory=list, repr=False)  # of the data pages, in values
    contents: dict[int, Content] = field(default_factory=dict, repr=False)  # of pages, by where they start
    values: dict[int, array[int]] = field(default_factory=dict, repr=False)  # where those of a page end, likewise

    def value(self, row: int) -> bytes | None:
        """The value of a row of the row group; None where there is none.

        Raises OSError for a file that is gone, Damaged, and what pyarrow raises.
        """
        with open(self.file, "rb") as file:
            try:
                if self.repeated:
                    raise Unknown
                return self._value(file.fileno(), row)
            except Unknown:
                return self._by_pyarrow(row)

    def _value(self, file: int, row: int) -> bytes | None:
        if self.pages is None:
            pages = list(_pages(file, self.start, self.start + self.size))
            ends = list(accumulate(page.values for page in pages if page.kind != DICTIONARY))
            self.ends, self.pages = ends, pages  # another thread that is here finds the same
        data = [page for page in self.pages if page.kind != DICTIONARY]
        at = bisect_right(self.ends, row)
        if at == len(data):
            raise Damaged(f"{self.name} has {self.ends[-1] if data else 0} values, so that row {row + 1} is none")
        page, place = data[at], row - (self.ends[at] - data[at].values)
        bytes_of = self._content(file, page)
        levels, begin = self._levels(file, page, bytes_of)
        count = page.values
        if levels is not None:
            if levels[place] != self.levels:
                return None
            present = [level == self.levels for level in levels]
            place, count = sum(present[:place]), sum(present)
        if page.encoding == PLAIN:
            return self._nth(file, page, bytes_of, begin, count, place)
        if page.encoding not in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            raise Unknown
        words = [page for page in self.pages if page.kind == DICTIONARY]
        if len(words) != 1 or words[0].encoding not in (PLAIN, PLAIN_DICTIONARY):
            raise Unknown
        packed = bytes_of.read(file, begin, bytes_of.size)
        index = _hybrid(packed[1:], packed[0], place + 1)[place]
        return self._nth(file, words[0], self._content(file, words[0]), 0, words[0].values, index)

    def _content(self, file: int, page: Page) -> Content:
        """The bytes of a page, without the levels of a DATA_V2 page."""
        if page.start in self.contents:
            return self.contents[page.start]
        before = sum(page.levels or ())
        codec = self.codec if page.compressed else None
        found = content(file, page.start + before, page.size - before, page.plain - before, codec)
        if not isinstance(found, Whole):  # which would fill the memory
            self.contents[page.start] = found
        return found

    def _levels(self, file: int, page: Page, bytes_of: Content) -> tuple[list[int] | None, int]:
        """The definition level of each value, None where all are there, and where the values begin."""
        width = self.levels.bit_length()
        if page.levels is not None:
            repetitions, definitions = page.levels
            packed = Uncompressed(page.start + repetitions, definitions).read(file, 0, definitions)
            return (_hybrid(packed, width, page.values), 0) if width else (None, 0)
        if not width:
            return None, 0
        length = int.from_bytes(bytes_of.read(file, 0, 4), "little")
        return _hybrid(bytes_of.read(file, 4, length), width, page.values), 4 + length

    def _nth(self, file: int, page: Page, bytes_of: Content, begin: int, count: int, place: int) -> bytes:
        """A byte string of `count`, before each of which stands its length. begin: of the first."""
        ends = self.values.get(page.start)
        if ends is None:
            ends = self.values[page.start] = _ends(file, bytes_of, begin, count)
        start = (ends[place - 1] if place else begin) + 4
        found = bytes(bytes_of.read(file, start, ends[place] - start))
        if len(found) < ends[place] - start:
            raise Damaged("it is cut short")
        return found

    def _by_pyarrow(self, row: int) -> bytes | None:
        from pyarrow import parquet

        with parquet.ParquetFile(self.file, pre_buffer=False) as file:
            for batch in file.iter_batches(FEW, row_groups=[self.group], columns=[self.name]):
                if row < len(batch):
                    value = batch.column(0)[row].as_py()
                    return value.get("bytes") if isinstance(value, dict) else value
                row -= len(batch)
        raise Damaged(f"{self.name} has fewer rows than it says")


def column_of(file: str, group: int, name: str, metadata: Any, schema: Any) -> Column:
    """The column of a path such as "jpg_0" or "jpg_0.bytes" in a row group. metadata, schema: pyarrow's."""
    at = next(i for i in range(len(schema)) if schema.column(i).path == name)
    told, kind = metadata.row_group(group).column(at), schema.column(at)
    start = told.data_page_offset
    if told.has_dictionary_page and told.dictionary_page_offset is not None:
        start = min(start, told.dictionary_page_offset)
    codec = {"UNCOMPRESSED": None, "LZ4": "lz4_raw"}.get(told.compression, told.compression.lower())
    return Column(
        file, group, name, start, told.total_compressed_size, codec, kind.max_definition_level,
        kind.max_repetition_level > 0,
    )  # fmt: skip


def _pages(file: int, begin: int, end: int) -> Iterator[Page]:
    while begin < end:
        size = HEADER
        while True:
            read = os.pread(file, min(size, end - begin), begin)
            try:
                told, length = _struct(read, 0)
                break
            except IndexError:
                if size >= min(end - begin, LONGEST_HEADER) or not read:
                    raise Damaged(f"no page at byte {begin}") from None
                size *= 16
        try:
            yield (page := _page(told, begin + length))
        except (KeyError, TypeError, AttributeError):
            raise Damaged(f"no page at byte {begin}") from None
        begin = page.start + page.size


def _page(told: dict[int, Any], start: int) -> Page:
    kind, plain, size = told[1], told[2], told[3]
    if min(plain, size) < 0:
        raise KeyError
    if kind == DATA:
        return Page(kind, start, size, plain, told[5][1], told[5][2])
    if kind == DICTIONARY:
        return Page(kind, start, size, plain, told[7][1], told[7][2])
    if kind == DATA_V2:
        more = told[8]
        return Page(kind, start, size, plain, more[1], more[4], (more[6], more[5]), more.get(7, True))
    raise KeyError


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol by the numbers of its fields, and where it ends. IndexError: it goes on."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, at = _zigzag(data, at)
        if kind in _BOOLEANS:
            fields[number] = kind == 1
        else:
            fields[number], at = _thrift(data, at, kind)
    return fields, at + 1


def _thrift(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(data, at)
    if kind in (_BYTE, *_BOOLEANS):  # a truth value has a byte of its own in a list
        return data[at], at + 1
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _BINARY:
        length, at = varint(data, at)
        return None, at + length
    if kind == _STRUCT:
        return _struct(data, at)
    if kind in _LISTS:
        head, at = data[at], at + 1
        count, of = head >> 4, head & 15
        if count == 15:
            count, at = varint(data, at)
        for _ in range(count):
            _, at = _thrift(data, at, of)
        return None, at
    raise Damaged(f"a field of unknown type {kind}")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _hybrid(data: memoryview, width: int, count: int) -> list[int]:
    """The first `count` numbers of parquet's mixture of runs and of groups of eight that are packed in bits."""
    found: list[int] = []
    at, size, mask = 0, (width + 7) // 8, (1 << width) - 1
    try:
        while len(found) < count:
            head, at = varint(data, at)
            if head & 1:
                groups = head >> 1
                packed = int.from_bytes(data[at : at + groups * width], "little")
                found += [packed >> shift & mask for shift in range(0, groups * 8 * width, width)] if width else [0] * 8
                at += groups * width
            else:
                found += [int.from_bytes(data[at : at + size], "little")] * min(head >> 1, count - len(found))
                at += size
    except IndexError:
        raise Damaged("fewer values than it says") from None
    return found[:count]


def _ends(file: int, bytes_of: Content, begin: int, count: int) -> array[int]:
    """Where each of `count` byte strings ends."""
    found, window, at = array("q"), memoryview(b""), begin
    for _ in range(count):
        if at + 4 > begin + len(window):
            window, begin = bytes_of.read(file, at, WINDOW), at
        at += 4 + int.from_bytes(window[at - begin : at - begin + 4], "little")
        if at > bytes_of.size:
            raise Damaged("it is cut short")
        found.append(at)
    return found
