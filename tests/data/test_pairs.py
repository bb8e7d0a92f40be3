"""Preference pairs are read from three kinds of files alike, and what is wrong with one is told in a line or two."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from draftplus.data import places
from draftplus.data.pairs import Broken, Pairs, caption_key, read_pairs
from draftplus.data.pictures import Undecodable
from draftplus.data.places import contents_hash
from draftplus.errors import UserError

Rows = list[dict[str, Any]]


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "PNG")
    return buffer.getvalue()


def some_rows() -> Rows:
    labels = [(1.0, 0.0), (0.25, 0.75), (0.5, 0.5)]
    return [
        {"jpg_0": png(2 * i), "jpg_1": png(2 * i + 1), "label_0": first, "label_1": second, "caption": f"animal {i}"}
        for i, (first, second) in enumerate(labels)
    ]


def as_parquet(rows: Rows, directory: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "pairs.parquet", row_group_size=2)
    return directory / "pairs.parquet"


def as_jsonl(rows: Rows, directory: Path) -> Path:
    lines = []
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        for side in (0, 1):
            if f"jpg_{side}" in row and isinstance(row[f"jpg_{side}"], bytes):
                (directory / f"pictures/{i}-{side}.png").write_bytes(row[f"jpg_{side}"])
                row = {**row, f"jpg_{side}": f"pictures/{i}-{side}.png"}
        lines.append(json.dumps(row) + "\n")
    (directory / "pairs.jsonl").write_text("".join(lines))
    return directory / "pairs.jsonl"


def as_tar(rows: Rows, directory: Path, mode: str = "w") -> Path:
    path = directory / ("pairs.tar" if mode == "w" else "pairs.tar.gz")
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for i, row in enumerate(rows):
            told = {key: value for key, value in row.items() if not key.startswith("jpg")}
            members = {f"{i:03}.json": json.dumps(told).encode()}
            members |= {f"{i:03}.{side}.png": row[f"jpg_{side}"] for side in (0, 1) if f"jpg_{side}" in row}
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def as_compressed_tar(rows: Rows, directory: Path) -> Path:
    return as_tar(rows, directory, "w:gz")


WRITERS = [as_parquet, as_jsonl, as_tar, as_compressed_tar]
Writer = Callable[[Rows, Path], Path]


@pytest.mark.parametrize("write", WRITERS)
def test_reads_pairs_in_any_order(write: Writer, tmp_path: Path) -> None:
    pairs = read_pairs(write(some_rows(), tmp_path))
    assert [pairs.caption(i) for i in range(3)] == ["animal 0", "animal 1", "animal 2"]
    assert [pairs.label(i) for i in range(3)] == [1, 0.25, 0.5]
    for i in (2, 0, 1, 2):
        first, second = pairs.pictures(i)
        assert torch.equal(first, torch.from_numpy(picture(2 * i)).permute(2, 0, 1))
        assert torch.equal(second, torch.from_numpy(picture(2 * i + 1)).permute(2, 0, 1))


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        as_tar([{**row, "caption": name} for row in some_rows()], tmp_path / name).rename(tmp_path / f"{name}.tar")
    assert [row.caption for row in read_pairs(tmp_path)] == ["a"] * 3 + ["b"] * 3
    assert len(read_pairs(tmp_path / "{a..b}.tar")) == 6
    with pytest.raises(UserError, match=r"no file of pairs '.*c\.tar'"):
        read_pairs(tmp_path / "{a..c}.tar")


def test_rows_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = [{**row, "has_label": i != 1} for i, row in enumerate(some_rows())]
    rows[1] |= {"label_0": 0.0, "label_1": 0.0}
    pairs = read_pairs(as_parquet(rows, tmp_path))
    assert len(pairs) == 2 and pairs.unlabelled == 1


@pytest.mark.parametrize("write", WRITERS)
def test_labels_sum_to_one(write: Writer, tmp_path: Path) -> None:
    rows = some_rows()
    rows[1] |= {"label_0": 0.7, "label_1": 0.7}
    with pytest.raises(UserError, match=r"label_0 0\.7 and label_1 0\.7 sum to 1\.4; they must sum to 1"):
        read_pairs(write(rows, tmp_path))
    rows[1] |= {"label_0": -0.5, "label_1": 1.5}
    with pytest.raises(UserError, match=r"label_0 is -0\.5; it must be a number from 0 to 1"):
        read_pairs(write(rows, tmp_path))


@pytest.mark.parametrize("write", WRITERS)
def test_an_absent_column_is_named(write: Writer, tmp_path: Path) -> None:
    without = [{key: value for key, value in row.items() if key != "label_1"} for row in some_rows()]
    with pytest.raises(UserError, match=r"has no (column|field) label_1, but .*label_0"):
        read_pairs(write(without, tmp_path))
    blind = [{key: value for key, value in row.items() if key != "jpg_1"} for row in some_rows()]
    with pytest.raises(UserError, match=r"has no (column jpg_1|field jpg_1|000\.1\.jpg)"):
        read_pairs(write(blind, tmp_path))


def test_a_sample_without_words_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name in ("7.0.jpg", "7.1.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UserError, match=r"sample 7 has no 7\.json"):
        read_pairs(tmp_path / "pairs.tar")


@pytest.mark.parametrize("write", [as_parquet, as_tar, as_compressed_tar])
def test_a_truncated_file_is_refused(write: Writer, tmp_path: Path) -> None:
    path = write(some_rows() * 20, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"truncated or not a tar|damaged or not a parquet"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.tar", "empty.parquet", "empty.tar.gz"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=name):
        read_pairs(tmp_path / name)


def test_files_without_a_pair_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    tarfile.open(tmp_path / "none.tar", "w").close()
    for name in ("blank.jsonl", "none.tar"):
        with pytest.raises(UserError, match=f"{name}' has no pairs"):
            read_pairs(tmp_path / name)
    with pytest.raises(UserError, match=r"cannot read pairs from '.*pairs\.zip': give a \.parquet"):
        (tmp_path / "pairs.zip").touch()
        read_pairs(tmp_path / "pairs.zip")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "pictures/../../secret.png", ".."])
def test_a_picture_outside_of_the_directory_is_refused(name: str, tmp_path: Path) -> None:
    rows = some_rows()
    rows[1]["jpg_1"] = name
    with pytest.raises(UserError, match=r"line 2: jpg_1 '.*' is outside of the file's own directory"):
        read_pairs(as_jsonl(rows, tmp_path))


def test_broken_pictures_are_counted_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = some_rows()
    rows[0]["jpg_0"] = b"no picture"
    rows[1]["jpg_1"] = rows[1]["jpg_1"][:60]
    rows[2]["jpg_0"] = "pictures/gone.png"
    pairs, broken = read_pairs(as_jsonl(rows, tmp_path)), Broken(2, "data.max_broken")
    for i in range(3):
        with pytest.raises(Undecodable) as reason:
            pairs.pictures(i)
        if i < 2:
            broken.add(pairs.where(i), str(reason.value))
            broken.add(pairs.where(i), str(reason.value))  # met again in another epoch
    assert capsys.readouterr().err.count("so the pair is left out") == 2
    with pytest.raises(UserError, match=r"3 pairs have a picture that cannot be read, more than data\.max_broken=2"):
        broken.add(pairs.where(2), "gone")


def test_damaged_bytes_inside_of_a_tar_are_a_broken_picture(tmp_path: Path) -> None:
    rows = some_rows()
    rows[1]["jpg_0"] = gzip.compress(b"no picture")
    pairs = read_pairs(as_tar(rows, tmp_path))
    with pytest.raises(Undecodable):
        pairs.pictures(1)
    assert pairs.pictures(2)[0].shape == (3, 8, 6)


def test_only_compressed_archives_are_copied_and_only_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MOST_COPIED", 1000)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("a temporary file"))
    for write in (as_parquet, as_jsonl, as_tar):
        assert len(read_pairs(write(some_rows() * 3, tmp_path))) == 9
    with pytest.raises(
        UserError, match=r"(?s)copy more than 1e-06 GB .* by gunzip '.*pairs\.tar\.gz', and give the \.tar"
    ):
        read_pairs(as_compressed_tar(some_rows() * 3, tmp_path))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**some_rows()[0], "jpg_0": bytes(2_000_000), "jpg_1": bytes(2_000_000)}
    path = as_compressed_tar([row], tmp_path)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(places, "MOST_COPIED", 3_000_000)
    with pytest.raises(UserError, match="by gunzip"):
        read_pairs(path)


def test_a_compressed_tar_is_known_by_its_content(tmp_path: Path) -> None:
    as_compressed_tar(some_rows(), tmp_path).rename(tmp_path / "pairs.tar")
    assert torch.equal(read_pairs(tmp_path / "pairs.tar").pictures(1)[0], torch.from_numpy(picture(2)).permute(2, 0, 1))


# whether pictures are still the same


def mark(pairs: Pairs) -> str:
    return contents_hash(pairs.places())


@pytest.mark.parametrize("write", WRITERS)
def test_copies_are_the_same_and_other_pictures_are_not(write: Writer, tmp_path: Path) -> None:
    for name in ("one", "copy", "other"):
        (tmp_path / name).mkdir()
    rows = some_rows()
    path = write(rows, tmp_path / "one")
    copy = Path(shutil.copytree(path.parent, tmp_path / "copy", dirs_exist_ok=True)) / path.name
    for file in copy.parent.rglob("*"):
        os.utime(file, (1, 1))
    assert mark(read_pairs(path)) == mark(read_pairs(copy))
    rows[1]["jpg_1"] = rows[1]["jpg_1"][:-20] + bytes([rows[1]["jpg_1"][-20] ^ 1]) + rows[1]["jpg_1"][-19:]
    assert mark(read_pairs(write(rows, tmp_path / "other"))) != mark(read_pairs(path))


def test_which_picture_is_in_which_pair_counts(tmp_path: Path) -> None:
    marks = set()
    for names in (["a", "b", "a", "b"], ["a", "b", "b", "a"]):
        lines = [
            json.dumps({"jpg_0": f"{one}.png", "jpg_1": f"{other}.png", "label_0": 1, "label_1": 0, "caption": "a cat"})
            for one, other in zip(names[::2], names[1::2], strict=True)
        ]
        for name in "ab":
            (tmp_path / f"{name}.png").write_bytes(png(ord(name)))
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        marks.add(mark(read_pairs(tmp_path / "pairs.jsonl")))
    assert len(marks) == 2


def test_of_a_large_picture_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()[:1]
    whole = bytearray(np.random.default_rng(0).bytes(3_000_000))
    rows[0]["jpg_0"] = bytes(whole)
    before = mark(read_pairs(as_jsonl(rows, tmp_path)))
    for at in (0, len(whole) // 2, len(whole) - 1):
        changed = bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]])
        assert mark(read_pairs(as_jsonl([{**rows[0], "jpg_0": changed}], tmp_path))) != before
    assert mark(read_pairs(as_jsonl([{**rows[0], "jpg_0": bytes(whole) + b"\0"}], tmp_path))) != before
    (tmp_path / "pictures/0-0.png").unlink()
    assert mark(read_pairs(tmp_path / "pairs.jsonl")) != before
    assert sum(size for _, size in places._looked_at(3_000_000)) == 3 * 4096
    assert sum(size for _, size in places._looked_at(10**9)) == 16 * 4096


def test_captions_that_hardly_differ_are_the_same() -> None:
    assert caption_key("A  cat.") == caption_key("a cat") == caption_key("\uff41 CAT!")
    assert caption_key("a cat") != caption_key("a cap")
    assert caption_key("!?") != caption_key("...")
