"""The rows of one file of preference pairs: parquet, JSON lines, and tar archives."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from draftplus.data.formats import DAMAGED_TAR, TARS, members, parsed, short
from draftplus.data.parquet_pages import column_of
from draftplus.data.places import Copies, InFile, InParquet, Place
from draftplus.data.text import decoded, lines
from draftplus.errors import UserError

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")  # as in Pick-a-Pic
WORDS = ("label_0", "label_1", "caption")
ENDINGS = re.compile(r"([01])\.(jpe?g|png|webp)", re.IGNORECASE)  # of a tar's pictures, after the sample's key
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # how gzip, bzip2 and xz begin
ROWS = 4096  # whose words are read at a time
_EXAMPLE = '{"jpg_0": "a.jpg", "jpg_1": "b.jpg", "label_0": 1, "label_1": 0, "caption": "a cat"}'


Found = tuple[Mapping[str, Any], tuple[Place, Place], str]  # a row's fields, its pictures, and where it stands


def kind_of(path: Path) -> str | None:
    """The ending by which a file of pairs is read; None where it is none."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), None)


def _parquet(path: Path, copies: Copies, labelled: bool) -> Iterator[Found]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow to be read: pip install 'draftplus[parquet]'.") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_lacking(_wanted(COLUMNS, labelled), names, f"'{path}'", "column")
            paths = [_leaf(file.schema, name, path) for name in COLUMNS[:2]]
            chosen = [name for name in (*WORDS, "has_label") if name in names]
            number = 0
            for group in range(file.num_row_groups):
                first, second = (column_of(str(path), group, one, file.metadata, file.schema) for one in paths)
                row = 0
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=chosen):
                    for fields in batch.to_pylist():
                        number += 1
                        yield fields, (InParquet(first, row), InParquet(second, row)), f"{path}, row {number}"
                        row += 1
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{path}' is damaged or not a parquet file ({reason}): create it again.") from None


def _leaf(schema: Any, name: str, path: Path) -> str:
    """The column with a picture's bytes: the one of this name, or what `datasets` makes of a column of pictures."""
    columns = [schema.column(i) for i in range(len(schema))]
    for column in columns:
        bytes_of = column.physical_type == "BYTE_ARRAY" and column.converted_type != "UTF8"
        if bytes_of and column.path in (name, f"{name}.bytes"):
            return str(column.path)
    told = ", ".join(f"{one.path} of {one.physical_type}" for one in columns if one.path.split(".")[0] == name)
    raise UserError(f"'{path}': column {name} has no pictures ({told}); it must hold the bytes of encoded pictures.")


def _jsonl(path: Path, copies: Copies, labelled: bool) -> Iterator[Found]:
    for number, line in lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            row = _object(parsed(line, where, f"; each line must be an object such as {_EXAMPLE}"), where)
            _refuse_lacking(_wanted(COLUMNS, labelled), row, where, "field")
            first, second = (_below(path.parent, row[name], name, where) for name in COLUMNS[:2])
            yield row, (first, second), where


def _below(directory: Path, name: Any, field: str, where: str) -> Place:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: {field} is {short(name)}; it must be the name of a file.")
    if PurePosixPath(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == "..":
        raise UserError(
            f"{where}: {field} '{name}' is outside of the file's own directory {directory}; name pictures below it."
        )
    return InFile(str(directory / name))


def _tar(path: Path, copies: Copies, labelled: bool) -> Iterator[Found]:
    plain = _is_plain(path)
    if not plain:
        copies.begin(path)
    words: dict[str, Mapping[str, Any]] = {}
    pictures: dict[str, dict[str, Place]] = {}
    try:
        for member, read in members(path):
            directory, _, name = member.name.rpartition("/")
            if name.startswith("._"):  # what macOS adds beside each file
                continue
            key, _, ending = name.partition(".")
            sample, picture = f"{directory}/{key}" if directory else key, ENDINGS.fullmatch(ending)
            where = f"{path}, member {member.name}"
            if picture is None and ending.lower() != "json":
                continue
            known = pictures.setdefault(sample, {})
            if not member.isreg():
                raise UserError(f"{where} is a link: pack the file that it stands for.")
            if picture[1] in known if picture else sample in words:
                raise UserError(f"{where}: this sample has another of it; rename or remove one of them.")
            if picture is not None:
                inside = InFile(str(path), member.offset_data, member.size)
                known[picture[1]] = inside if plain else copies.add(read(), path)
            else:
                words[sample] = _object(parsed(decoded(read(), where), where, ""), where)
    except DAMAGED_TAR as error:
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar file ({reason}): download or create it again.") from error
    copies.flush(path)
    for sample, known in pictures.items():
        lacking = [ending for ending in ("0", "1") if ending not in known]
        if lacking or sample not in words:
            raise UserError(f"{path}: sample {sample} has no {sample}.{f'{lacking[0]}.jpg' if lacking else 'json'}.")
        where = f"{path}, member {sample}.json"
        _refuse_lacking(_wanted(WORDS, labelled), words[sample], where, "field")
        yield words[sample], (known["0"], known["1"]), where


def _is_plain(path: Path) -> bool:
    """Whether a tar is not compressed, whatever it is called."""
    with path.open("rb") as file:
        return not file.read(len(max(COMPRESSED, key=len))).startswith(COMPRESSED)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {short(value)} is not an object such as {_EXAMPLE}.")
    return value


def _wanted(names: Sequence[str], labelled: bool) -> list[str]:
    return [name for name in names if labelled or not name.startswith("label_")]


def _refuse_lacking(wanted: Sequence[str], there: Sequence[str] | Mapping[str, Any], where: str, what: str) -> None:
    absent = [name for name in wanted if name not in there]
    if absent:
        has = ", ".join(list(there)[:12]) or "none"
        raise UserError(f"{where} has no {what} {', '.join(absent)}, but {has}; pairs have {', '.join(wanted)}.")


READERS: dict[str, Callable[[Path, Copies, bool], Iterator[Found]]] = {
    ".parquet": _parquet, ".jsonl": _jsonl, **dict.fromkeys(TARS, _tar)
}  # fmt: skip
