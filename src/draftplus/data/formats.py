"""Reading the prompts of one file: text, JSON, tables, and tar archives of captions."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from draftplus.data.text import content, decoded, lines, not_utf8, opened_text
from draftplus.errors import UserError

FIELDS = ("prompt", "text", "caption")
SPLITS = ("train", "held_out")
TARS = (".tar", ".tar.gz", ".tgz")
DAMAGED_TAR = (tarfile.TarError, EOFError, ValueError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
MOST_LINES = 50  # of a caption: what is longer than any text encoder reads is a list of prompts
_EXAMPLE = '{"prompt": "a cat"}'


class Row(NamedTuple):
    """A prompt, the part of the set that its file puts it in, and where it stands, such as "line 3".

    fault: why it is no prompt, in words for the user; None: it is one.
    """

    prompt: str
    split: str | None
    place: str
    fault: str | None = None


def kind_of(path: Path) -> str | None:
    """The ending by which a file is read, whatever its case; None where it is no file of prompts."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), None)


def _text(path: Path, column: str | None) -> Iterator[Row]:
    name = str(path)
    for number, line in lines(path):
        if text := line.strip():
            yield _plain(text, name, f"line {number}")


def _jsonl(path: Path, column: str | None) -> Iterator[Row]:
    for number, line in lines(path):
        if line.strip():
            place = f"line {number}"
            value = parsed(line, f"{path}, {place}", f"; each line must be an object such as {_EXAMPLE}")
            if not isinstance(value, dict):
                said = f"{line.strip()[:40]} is not an object; each line must be an object such as {_EXAMPLE}"
                raise UserError(f"{path}, {place}: {said}")
            yield _row(value, column, path, place)


def _json(path: Path, column: str | None) -> Iterator[Row]:
    wanted = f"a list of strings or of objects such as {_EXAMPLE}"
    entries = parsed(decoded(content(path), str(path)), str(path), f"; it must be {wanted}")
    if not isinstance(entries, list):
        raise UserError(f"{path} holds {short(entries)}; it must be {wanted}.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) and column is not None:
            raise UserError(f"{path}, entry {number}: {short(entry)} has no fields, but data.column is '{column}'.")
        yield _row(entry if isinstance(entry, dict) else {"prompt": entry}, column, path, f"entry {number}")


def _table(delimiter: str) -> Callable[[Path, str | None], Iterator[Row]]:
    def read(path: Path, column: str | None) -> Iterator[Row]:
        try:
            with opened_text(path, newline="") as file:
                # strict: a quote that is never closed would make one prompt of the rest of the file
                table = csv.reader(file, delimiter=delimiter, strict=True)
                names = [name.strip() for name in next(table, [])]
                _field(names, column, f"{path}, line 1")
                for cells in table:
                    place = f"line {table.line_num}"
                    if len(cells) not in (0, len(names)):
                        raise UserError(
                            f"{path}, {place}: {len(cells)} cells, but line 1 names {len(names)} columns; put text "
                            f"that contains {'a tab' if delimiter != ',' else 'a comma'} in double quotes."
                        )
                    if any(cell.strip() for cell in cells):
                        fields: dict[str, Any] = dict(zip(names, cells, strict=True))
                        if not fields.get("split"):
                            fields["split"] = None
                        yield _row(fields, column, path, place)
        except UnicodeDecodeError:
            raise not_utf8(path) from None
        except csv.Error as error:
            raise UserError(f"{path}, line {table.line_num}: {error}; put text with quotes in it in quotes.") from None

    return read


def parquet_rows(path: Path, column: str | None, opened: Any = None) -> Iterator[Row]:
    """Of a table's columns, only those that are needed are read. opened: the file, where it is not on the disk.

    Raises UserError for a damaged file, and without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"'{path}' needs pyarrow to be read: pip install 'draftplus[parquet]'.") from None
    try:
        with parquet.ParquetFile(path if opened is None else opened) as file:
            names = file.schema_arrow.names
            chosen = [_field(names, column, str(path)), *(name for name in ("split",) if name in names)]
            number = 0
            for batch in file.iter_batches(columns=chosen):
                for value in batch.to_pylist():
                    number += 1
                    yield _row(value, column, path, f"row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{path}' is damaged or not a parquet file ({reason}): create it again.") from None


def _tar(path: Path, column: str | None) -> Iterator[Row]:
    """One prompt of each sample: of the members whose names are equal up to the last dot, .txt before .caption before
    .json; with a column, .json only."""
    kinds = ("json",) if column is not None else ("txt", "caption", "json")
    chosen: dict[str, tuple[str, bytes]] = {}  # a sample's key -> the ending and content of its caption
    seen: set[str] = set()
    others = False
    try:
        for member, read in members(path):
            key, _, suffix = member.name.rpartition(".")
            if member.name.rpartition("/")[2].startswith("._"):  # what macOS adds beside each file
                continue
            if suffix.lower() not in kinds:
                others = True
                continue
            if member.name in seen:
                raise UserError(f"'{path}' has two members named {member.name}: rename or remove one of them.")
            seen.add(member.name)
            if not member.isreg():
                raise UserError(f"'{path}', member {member.name} is a link: pack the file that it stands for.")
            if key not in chosen or kinds.index(suffix.lower()) < kinds.index(chosen[key][0].lower()):
                chosen[key] = (suffix, read())
    except DAMAGED_TAR as error:
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar file ({reason}): download or create it again.") from error
    for key, (suffix, data) in chosen.items():
        place = f"member {key}.{suffix}"
        text = decoded(data, f"{path}, {place}")
        if suffix.lower() == "json":
            value = parsed(text, f"{path}, {place}", "")
            if not isinstance(value, dict):
                raise UserError(f"{path}, {place}: {short(value)} is not an object such as {_EXAMPLE}.")
            yield _row(value, column, path, place)
        elif text.strip():
            count = sum(bool(line.strip()) for line in io.StringIO(text, newline=None))
            if count > MOST_LINES or (count > 1 and len(chosen) == 1 and not others):
                name = f"{key}.{suffix}"
                raise UserError(
                    f"'{path}', member {name}: {count:,} lines, but a member is one prompt; unpack it and give {name} "
                    "itself, one prompt a line."
                )
            yield _plain(text.strip(), str(path), place)


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The members of an archive, compressed or not, that are no directories, each with what reads it.

    Raises TarError and others where it is cut short or damaged.
    """
    end = 0
    with tarfile.open(path, "r:*") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else a million of them stay in memory
            end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not member.isdir():
                yield member, lambda member=member: _content(tar, member)  # type: ignore[misc]
        # tarfile takes a cut between two members, or a header that makes no sense, for the end of the archive: only
        # the block of zeros in the place of the next header shows that nothing is missing
        stream: Any = tar.fileobj
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a member nor the end mark at byte {end}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    assert opened is not None
    return opened.read()


def _row(fields: Mapping[str, Any], column: str | None, path: Path, place: str) -> Row:
    """The row of named fields, of which one is the prompt and one may be the split."""
    where = f"{path}, {place}"
    field = _field(list(fields), column, where)
    prompt, split = fields[field], fields.get("split")
    if split is not None and split not in SPLITS:
        raise UserError(f"{where}: split is {short(split)}; it must be {' or '.join(SPLITS)}.")
    if not isinstance(prompt, str) or not prompt.strip():
        fault = f"{where}: {field} is {short(prompt)}; it must be a string that is not empty."
        return Row("", split, place, fault)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(prompt[error.start]):04x}"
        fault = (
            f"{where}: {field} contains {half}, one half of a character without the other; write the whole character."
        )
        return Row("", split, place, fault)
    return _plain(prompt.strip(), str(path), place, split)


def _plain(text: str, path: str, place: str, split: str | None = None) -> Row:
    if "\0" in text:
        fault = f"{path}, {place} contains NUL characters, as UTF-16 does: save it as UTF-8, or take them out."
        return Row("", split, place, fault)
    return Row(text, split, place)


def _field(names: Sequence[str], column: str | None, where: str) -> str:
    """The name of the field that holds the prompt."""
    present = ", ".join(names) or "no field at all"
    if column is not None and column not in names:
        near = get_close_matches(column, names, n=1)
        mend = f"; did you mean '{near[0]}'?" if near else "."
        raise UserError(f"{where}: no field named '{column}', which data.column asks for, but {present}{mend}")
    field = column or next((name for name in FIELDS if name in names), None)
    if field is None:
        raise UserError(
            f"{where}: none of the fields {', '.join(FIELDS)}, but only {present}: "
            "rename the field that holds the prompt, or name it with data.column (of draftplus data: --column)."
        )
    if names.count(field) > 1:
        raise UserError(f"{where}: two columns are named '{field}'; rename one of them.")
    return field


def parsed(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}){wanted}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid as prompts, lists within lists too deep to be read{wanted}") from None


def short(value: object) -> str:
    try:
        return json.dumps(value)[:40]
    except (TypeError, ValueError, RecursionError):
        return f"of type {type(value).__name__}"


TEXTS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".txt": _text, ".jsonl": _jsonl, ".json": _json, ".csv": _table(","), ".tsv": _table("\t"),
}  # fmt: skip
READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    **TEXTS, **{f"{kind}.gz": read for kind, read in TEXTS.items()}, ".parquet": parquet_rows,
    **dict.fromkeys(TARS, _tar),
}  # fmt: skip
