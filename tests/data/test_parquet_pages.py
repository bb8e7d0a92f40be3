"""Pictures of a parquet file are read where they are: in any order, without a copy, without the rows before them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from draftplus.data import page_bytes, parquet_pages
from draftplus.data.pairs import read_pairs
from draftplus.data.parquet_pages import Column, column_of
from draftplus.data.pictures import Undecodable
from draftplus.data.places import InParquet
from draftplus.errors import UserError

ROWS = 300


def values(holes: bool, repeated: bool = False) -> list[bytes | None]:
    """Byte strings of all lengths from 0 to some thousands, some of them equal, some absent."""
    draw = np.random.default_rng(0)
    found: list[bytes | None] = [draw.bytes(int(draw.integers(0, 4000))) for _ in range(ROWS)]
    for i in range(0, ROWS, 5):  # much that Snappy makes shorter
        found[i] = (found[i] or b"")[:50] * int(draw.integers(0, 90))
    if repeated:
        found = [found[i % 7] for i in range(ROWS)]
    if holes:
        for i in (*range(0, ROWS, 9), *range(40, 70)):
            found[i] = None
    found[5] = b""
    return found


def columns(path: Path, name: str) -> list[Column]:
    with parquet.ParquetFile(path) as file:
        return [column_of(str(path), group, name, file.metadata, file.schema) for group in range(file.num_row_groups)]


def everything(path: Path, name: str, group_size: int) -> list[bytes | None]:
    """All values, the last first."""
    found = columns(path, name)
    return [found[row // group_size].value(row % group_size) for row in reversed(range(ROWS))][::-1]


def no_pyarrow(self: Column, row: int) -> Any:
    raise AssertionError("read from the beginning of the row group")


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("kind", ["plain", "dictionary", "both", "holes", "required", "struct"])
def test_any_row_is_read_by_its_page(
    kind: str, version: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Column, "_by_pyarrow", no_pyarrow)
    given = values(kind in ("holes", "struct"), kind == "dictionary")
    table: Any = pyarrow.table({"jpg_0": pyarrow.array(given, pyarrow.binary())})
    name = "jpg_0"
    if kind == "required":
        table = table.cast(pyarrow.schema([pyarrow.field("jpg_0", pyarrow.binary(), nullable=False)]))
    if kind == "struct":  # as `datasets` stores pictures; some rows have no struct, some a struct without bytes
        told = [None if i % 50 == 1 else {"bytes": one, "path": "x"} for i, one in enumerate(given)]
        given = [None if one is None else one["bytes"] for one in told]
        form = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table, name = pyarrow.table({"jpg_0": pyarrow.array(told, form)}), "jpg_0.bytes"
    parquet.write_table(
        table, tmp_path / "it.parquet", row_group_size=110, compression=compression, data_page_version=version,
        data_page_size=20_000, use_dictionary=kind in ("dictionary", "both"), dictionary_pagesize_limit=100_000,
        write_batch_size=8, write_statistics=kind != "holes",
    )  # fmt: skip
    assert everything(tmp_path / "it.parquet", name, 110) == given
    made = columns(tmp_path / "it.parquet", name)[0]
    made.value(0)
    assert made.pages is not None and len(made.pages) > 1, "of several pages, or nothing was tested"
    kinds = {page.encoding for page in made.pages if page.kind != parquet_pages.DICTIONARY}
    assert len(kinds) == (2 if kind == "both" else 1)


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"])
def test_other_encodings_are_left_to_pyarrow(encoding: str, tmp_path: Path) -> None:
    given = values(True)
    parquet.write_table(
        pyarrow.table({"jpg_0": given}), tmp_path / "it.parquet", row_group_size=110, use_dictionary=False,
        column_encoding={"jpg_0": encoding},
    )  # fmt: skip
    assert everything(tmp_path / "it.parquet", "jpg_0", 110) == given


def save(path: Path, count: int, size: int, **settings: Any) -> list[bytes]:
    draw = np.random.default_rng(count)
    pictures = [draw.bytes(size) for _ in range(2 * count)]
    told = {"jpg_0": pictures[::2], "jpg_1": pictures[1::2], "label_0": [1.0] * count, "label_1": [0.0] * count}
    table = pyarrow.table({**told, "caption": [f"{path.stem} {i}" for i in range(count)]})
    parquet.write_table(table, path, **settings)
    return pictures


def test_a_directory_of_shards_is_read_without_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp", "mkdtemp"):
        monkeypatch.setattr(tempfile, name, lambda *_, **__: pytest.fail("a temporary file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    (tmp_path / "shards").mkdir()
    names = [f"train-{i:05}-of-00003" for i in range(3)]
    pictures = {name: save(tmp_path / f"shards/{name}.parquet", 5 + i, 900) for i, name in enumerate(names)}
    for source in (tmp_path / "shards", tmp_path / "shards" / "train-*.parquet"):
        pairs = read_pairs(source)
        assert len(pairs) == 18
        for i in np.random.default_rng(0).permutation(18):
            name, number = pairs.caption(i).split()
            assert pairs.bytes_of(i) == tuple(pictures[name][2 * int(number) : 2 * int(number) + 2])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_memory_does_not_grow_with_a_row_group(compression: str, tmp_path: Path) -> None:
    # 160 MB in a single row group, all of it in two pages
    save(tmp_path / "large.parquet", 200, 400_000, row_group_size=200, compression=compression)
    code = f"""
import random
from pathlib import Path
import pyarrow.parquet
from draftplus.data.pairs import read_pairs
import draftplus.data.places
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3
before = peak = resident()
pairs = read_pairs({str(tmp_path / "large.parquet")!r})
for i in random.Random(0).sample(range(200), 100):
    assert all(len(one) == 400_000 for one in pairs.bytes_of(i))
    peak = max(peak, resident())
print(peak - before, pyarrow.default_memory_pool().max_memory() / 1e6)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(float, told.stdout.split())) < 20, "megabytes of this process, and at most at a time of pyarrow"


def test_damage_between_the_pages_is_a_broken_picture(tmp_path: Path) -> None:
    pictures = save(tmp_path / "it.parquet", 60, 30_000, compression="snappy", use_dictionary=False)
    place = read_pairs(tmp_path / "it.parquet").rows[0].pictures[0]
    assert isinstance(place, InParquet) and place.read() == pictures[0] and place.column.pages is not None
    whole, page = bytearray((tmp_path / "it.parquet").read_bytes()), place.column.pages[0]
    for begin, end in ((page.start, page.start + 40), (page.start + page.size, page.start + page.size + 12)):
        (tmp_path / "it.parquet").write_bytes(whole[:begin] + b"\xff" * (end - begin) + whole[end:])
        pairs, broken = read_pairs(tmp_path / "it.parquet"), 0
        for i in range(60):
            try:
                pairs.bytes_of(i)
            except Undecodable as error:
                assert "damaged" in str(error)
                broken += 1
        assert broken > 0


def test_what_holds_no_pictures_is_refused(tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {"jpg_0": [b"x"], "jpg_1": [b"y"], "label_0": [1.0], "label_1": [0.0]}
    for wrong, form in ((["a.jpg"], "BYTE_ARRAY"), ([3], "INT64"), ([{"path": "a.jpg"}], "jpg_1.path")):
        table = pyarrow.table({**told, "jpg_1": wrong, "caption": ["a cat"]})
        parquet.write_table(table, tmp_path / "it.parquet")
        with pytest.raises(UserError, match=rf"column jpg_1 has no pictures \(.*{form}"):
            read_pairs(tmp_path / "it.parquet")


def test_a_row_without_a_picture_is_a_broken_pair(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"jpg_0": [b"x", None], "jpg_1": [b"y", b"z"], "label_0": [1.0, 1.0], "label_1": [0.0, 0.0], "caption": "ab"}
        | {"caption": ["a", "b"]}
    )
    parquet.write_table(table, tmp_path / "it.parquet")
    pairs = read_pairs(tmp_path / "it.parquet")
    assert pairs.bytes_of(0) == (b"x", b"y")
    with pytest.raises(Undecodable, match="there is no jpg_0"):
        pairs.bytes_of(1)


@pytest.mark.parametrize("step", [1, 7, 700, 70_000])
def test_any_bytes_of_a_page_of_snappy_are_those_of_the_whole(step: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(step)
    alike = draw.bytes(step) * (400_000 // step)  # from one byte over and over to what hardly repeats
    plain = alike + draw.bytes(100_000) + bytes(50_000) + draw.bytes(3) * 11_111
    packed = pyarrow.Codec("snappy").compress(plain, asbytes=True)
    (tmp_path / "it").write_bytes(b"before" + packed + b"behind")
    with (tmp_path / "it").open("rb") as file:
        found = page_bytes.content(file.fileno(), 6, len(packed), len(plain), "snappy")
        assert isinstance(found, page_bytes.Blocks) and len(found.starts) == len(plain) // 65536 + 2
        for _ in range(200):
            at, size = int(draw.integers(len(plain))), int(draw.integers(1, 150_000))
            assert bytes(found.read(file.fileno(), at, size)) == plain[at : at + size]
        with pytest.raises((page_bytes.Damaged, OSError)):
            page_bytes.content(file.fileno(), 6, len(packed) + 2, len(plain), "snappy")


def test_blocks_of_snappy_that_need_one_another_are_not_read_alone(tmp_path: Path) -> None:
    first = np.random.default_rng(0).bytes(65_530)
    literal = bytes([61 << 2]) + (len(first) - 1).to_bytes(2, "little")
    copies = bytes([(64 - 1) << 2 | 2]) + (65_530).to_bytes(2, "little")  # 64 bytes from 65,530 back, over the border
    plain = first + first[:64]
    packed = bytes([len(plain) & 127 | 128, len(plain) >> 7 & 127 | 128, len(plain) >> 14]) + literal + first + copies
    (tmp_path / "it").write_bytes(packed)
    with (tmp_path / "it").open("rb") as file:
        found = page_bytes.content(file.fileno(), 0, len(packed), len(plain), "snappy")
        assert isinstance(found, page_bytes.Whole) and bytes(found.data) == plain
