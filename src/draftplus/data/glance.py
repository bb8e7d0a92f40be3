"""What a file of prompts tells of itself at a glance."""

from __future__ import annotations

import csv
import tarfile
from contextlib import suppress
from itertools import islice
from pathlib import Path

from draftplus.data.formats import TARS, TEXTS, kind_of, parsed
from draftplus.data.text import lines, opened_text

MEAN_BYTES = 50  # of a prompt that is compressed


def columns_of(path: Path) -> list[str]:
    """The fields that a file names, in the order in which they come; none for text and archives.

    Of lines of JSON, those of the first 1,000. Raises UserError for what cannot be read.
    """
    kind = (kind_of(path) or "").removesuffix(".gz")
    if kind in (".csv", ".tsv"):
        with opened_text(path, newline="") as file:
            return [name.strip() for name in next(csv.reader(file, delimiter="," if kind == ".csv" else "\t"), [])]
    if kind == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    if kind == ".jsonl":
        objects = (parsed(line, str(path), "") for _, line in islice(lines(path), 1000) if line.strip())
        return list(dict.fromkeys(name for one in objects if isinstance(one, dict) for name in one))
    return []


def rows_in(path: Path) -> int:
    """About how many rows a file has, at once: of an archive or compressed file, as if it had nothing but prompts."""
    kind = kind_of(path) or ""
    with suppress(ImportError, OSError, ValueError):  # which its reader will tell of
        if kind == ".parquet":
            from pyarrow import parquet

            return int(parquet.read_metadata(path).num_rows)
        if kind in TEXTS:
            with path.open("rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
        return path.stat().st_size // (2 * tarfile.BLOCKSIZE if kind in TARS else MEAN_BYTES)
    return 0
