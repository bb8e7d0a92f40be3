"""The rows of one file of preference pairs: parquet, JSON lines, and tar archives."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from draftplus.data.formats import DAMAGED_TAR, TARS, members, parsed, short
from draftplus.data.text import decoded, lines
from draftplus.errors import UserError

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")  # as in Pick-a-Pic
WORDS = ("label_0", "label_1", "caption")
ENDINGS = re.compile(r"([01])\.(jpe?g|png|webp)", re.IGNORECASE)  # of a tar's pictures, after the sample's key
_EXAMPLE = '{"jpg_0": "a.jpg", "jpg_1": "b.jpg", "label_0": 1, "label_1": 0, "caption": "a cat"}'


class Place(NamedTuple):
    """Where a picture's bytes are. file: "" for the temporary one. size: None for the whole file."""

    file: str
    start: int = 0
    size: int | None = None


Found = tuple[Mapping[str, Any], tuple[Place, Place], str]  # a row's fields, its pictures, and where it stands


def kind_of(path: Path) -> str | None:
    """The ending by which a file of pairs is read; None where it is none."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), None)


def _parquet(path: Path, copy: IO[bytes], labelled: bool) -> Iterator[Found]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow to be read: pip install 'draftplus[parquet]'.") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_lacking(_wanted(COLUMNS, labelled), names, f"'{path}'", "column")
            number = 0
            for batch in file.iter_batches(64, columns=[name for name in (*COLUMNS, "has_label") if name in names]):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    data = [_encoded(row[name], name, where) for name in COLUMNS[:2]]
                    yield row, (_copied(data[0], copy), _copied(data[1], copy)), where
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{path}' is damaged or not a parquet file ({reason}): create it again.") from None


def _encoded(value: Any, name: str, where: str) -> bytes:
    value = value.get("bytes") if isinstance(value, Mapping) else value  # a picture as `datasets` stores it
    if not isinstance(value, bytes):
        raise UserError(f"{where}: {name} is {short(value)}; it must be the bytes of an encoded picture.")
    return value


def _copied(data: bytes, copy: IO[bytes]) -> Place:
    place = Place("", copy.tell(), len(data))
    copy.write(data)
    return place


def _jsonl(path: Path, copy: IO[bytes], labelled: bool) -> Iterator[Found]:
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
    return Place(str(directory / name))


def _tar(path: Path, copy: IO[bytes], labelled: bool) -> Iterator[Found]:
    plain = path.name.lower().endswith(".tar")
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
                place = Place(str(path), member.offset_data, member.size)
                known[picture[1]] = place if plain else _copied(read(), copy)
            else:
                words[sample] = _object(parsed(decoded(read(), where), where, ""), where)
    except DAMAGED_TAR as error:
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar file ({reason}): download or create it again.") from error
    for sample, known in pictures.items():
        lacking = [ending for ending in ("0", "1") if ending not in known]
        if lacking or sample not in words:
            raise UserError(f"{path}: sample {sample} has no {sample}.{f'{lacking[0]}.jpg' if lacking else 'json'}.")
        where = f"{path}, member {sample}.json"
        _refuse_lacking(_wanted(WORDS, labelled), words[sample], where, "field")
        yield words[sample], (known["0"], known["1"]), where


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


READERS: dict[str, Callable[[Path, IO[bytes], bool], Iterator[Found]]] = {
    ".parquet": _parquet, ".jsonl": _jsonl, **dict.fromkeys(TARS, _tar)
}  # fmt: skip
