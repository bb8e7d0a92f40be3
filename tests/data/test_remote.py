"""Data sets of the hub, read through a file system of the same kind over a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from draftplus.data.pack import PackRules, pack_prompts
from draftplus.data.prompts import load_prompts, read_prompts
from draftplus.data.remote import remote_rows
from draftplus.errors import UserError

NAME = "hf://datasets/owner/name"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that stands for the hub."""
    monkeypatch.setattr("draftplus.data.remote.why_offline", lambda: None)
    root = tmp_path / "hub"
    (root / "datasets" / "owner" / "name").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: DirFileSystem(str(root), LocalFileSystem()))
    return root / "datasets" / "owner"


def write_parquet(path: Path, prompts: list[str | None]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"caption": prompts, "jpg": [b"\xff" * 100_000] * len(prompts)}
    parquet.write_table(pyarrow.table(table), path, compression="none")


def prompts_of(source: str, column: str | None = None) -> list[str]:
    return [row.prompt for row in remote_rows(source, column)]


def test_parquet_files_are_read_in_order_without_their_pictures(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_parquet(hub / "name" / "data" / f"train-{number}.parquet", [f"a cat {number}", None])
    write_parquet(hub / "name" / "data" / "test-0.parquet", ["a dog"])
    (hub / "name" / "README.md").write_text("")
    assert prompts_of(NAME) == ["a dog", *[text for n in range(3) for text in (f"a cat {n}", "")]]
    assert prompts_of(f"{NAME}/data/train-*.parquet")[::2] == ["a cat 0", "a cat 1", "a cat 2"]
    first = next(iter(remote_rows(f"{NAME}/data/train-*.parquet", None)))
    assert first.place == "datasets/owner/name/data/train-0.parquet, row 1"


def test_what_the_hub_converted_is_second_and_text_is_third(hub: Path) -> None:
    (hub / "name" / "rows.jsonl").write_text('{"title": "a cat"}\n')
    (hub / "name" / "other.txt").write_text("not this\n")
    assert prompts_of(NAME, "title") == ["a cat"]
    assert prompts_of(f"{NAME}/*.txt", "title") == ["not this"]
    write_parquet(hub / "name@refs%2Fconvert%2Fparquet" / "default" / "0.parquet", ["a dog"])
    assert prompts_of(NAME, "caption") == ["a dog"]
    (hub / "name@1.0").mkdir()
    (hub / "name@1.0" / "old.txt").write_text("a cow\n")
    assert prompts_of(f"{NAME}@1.0") == ["a cow"]


def test_they_are_packed_and_training_says_so(hub: Path, tmp_path: Path) -> None:
    write_parquet(hub / "name" / "0.parquet", ["a cat", None, "a dog"])
    told = pack_prompts([NAME], tmp_path / "out", rules=PackRules(held_out=0))
    assert told["dropped"] == {"unusable": 1} and read_prompts(tmp_path / "out") == ["a cat", "a dog"]
    with pytest.raises(UserError, match="draftplus data pack"):
        load_prompts(NAME)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf://models/owner/name", "only data sets are read"),
        ("hf://datasets/name", "names no data set"),
        ("hf://datasets/owner/absent", "has no file of prompts"),
        (f"{NAME}/*.parquet", "has no file of prompts"),
        (f"{NAME}/README.md", "cannot be read as prompts"),
        (NAME, "has no file of prompts"),
    ],
)
def test_bad_sources_are_named(hub: Path, source: str, words: str) -> None:
    (hub / "name" / "README.md").write_text("")
    with pytest.raises(UserError, match=words):
        prompts_of(source)


def test_a_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem

    def absent(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("datasets/owner/absent (repository not found)")

    monkeypatch.setattr("draftplus.data.remote.why_offline", lambda: None)
    monkeypatch.setattr(HfFileSystem, "resolve_path", absent)
    with pytest.raises(UserError, match=r"absent' cannot be read \(.*not found\)\): check its name"):
        prompts_of("hf://datasets/owner/absent")


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftplus.data.remote.why_offline", lambda: "huggingface.co cannot be reached")
    with pytest.raises(UserError, match="is on the hub, but huggingface"):
        prompts_of(NAME)


def test_without_pyarrow(hub: Path, monkeypatch: Any) -> None:
    write_parquet(hub / "name" / "0.parquet", ["a cat"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'draftplus\[parquet\]'"):
        prompts_of(NAME)
