"""Prompts of data sets on the Hugging Face hub, of which only the column with the prompts is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from draftplus.data.formats import READERS, Row, kind_of, parquet_rows
from draftplus.errors import UserError
from draftplus.hub import why_offline

SCHEME = "hf://datasets/"
CONVERTED = "refs/convert/parquet"  # where the hub keeps every public data set as parquet
PREFERRED = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")


def is_remote(source: str | Path) -> bool:
    """Whether a source names a data set of the hub."""
    return str(source).startswith("hf://")


def remote_rows(source: str, column: str | None) -> Iterator[Row]:
    """The rows of `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`; a row's place names its file.

    PATTERN: of the files in it, such as data/train-*.parquet. Without one: its parquet files, or else those into which
    the hub has converted it, or else all that are .jsonl, .csv, .tsv or .txt, the first of these that there are. Of a
    parquet file, only the column of the prompts is fetched.

    Raises UserError for a data set that is not there or cannot be reached, and for what cannot be read in it.
    """
    name, revision, pattern = _parts(source)
    offline = why_offline()
    if offline is not None:
        raise UserError(f"'{source}' is on the hub, but {offline}; fetch its files where there is a network first")
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    fs = HfFileSystem()
    try:
        files = _files(fs, name, revision, pattern)
        if not files:
            raise UserError(
                f"'{source}' has no file of prompts: name some of its files, as in '{SCHEME}{name}/*.parquet'"
            )
        for file in files:
            for row in _rows(fs, file, column):
                yield row._replace(place=f"{file}, {row.place}")
    except (FileNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{source}' cannot be read ({reason[:160]}): check its name, and for a gated one run: hf auth login"
        ) from None


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """OWNER/NAME, the revision and the pattern."""
    if not source.startswith(SCHEME):
        raise UserError(f"'{source}': only data sets are read from the hub, as in {SCHEME}OWNER/NAME")
    owner, _, rest = source.removeprefix(SCHEME).partition("/")
    name, _, pattern = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise UserError(f"'{source}' names no data set: it must be {SCHEME}OWNER/NAME, perhaps with /PATTERN of files")
    return f"{owner}/{name}", revision or None, pattern or None


def _files(fs: Any, name: str, revision: str | None, pattern: str | None) -> Sequence[str]:
    root = f"datasets/{name}" + (f"@{revision.replace('/', '%2F')}" if revision else "")
    inside = sorted(fs.find(root))
    if pattern is not None:
        return [file for file in inside if fnmatch(file.removeprefix(f"{root}/"), pattern)]
    found = _of_kind(inside, ".parquet")
    if not found and revision is None:
        try:
            found = _of_kind(sorted(fs.find(f"datasets/{name}@{CONVERTED.replace('/', '%2F')}")), ".parquet")
        except FileNotFoundError:
            found = []
    return found or next((some for kind in PREFERRED if (some := _of_kind(inside, kind))), [])


def _of_kind(files: Sequence[str], kind: str) -> list[str]:
    return [file for file in files if file.lower().endswith(kind)]


def _rows(fs: Any, file: str, column: str | None) -> Iterator[Row]:
    kind, path = kind_of(Path(file)), Path(file)
    if kind is None:
        raise UserError(f"{file}: cannot be read as prompts; name other files of the data set")
    if kind == ".parquet":
        with fs.open(file) as opened:
            yield from parquet_rows(path, column, opened)
        return
    with TemporaryDirectory() as directory:
        local = Path(directory) / path.name
        fs.get_file(file, str(local))
        yield from READERS[kind](local, None if kind.startswith(".txt") else column)
