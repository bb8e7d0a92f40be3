"""Reading text that is UTF-8, also where it is compressed by gzip."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from draftplus.errors import UserError


@contextmanager
def opened_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of text, also where it is compressed by gzip."""
    with _unpacking(path), gzip.open(path) if _gzipped(path) else path.open("rb") as file:
        yield io.TextIOWrapper(cast(BinaryIO, file), encoding="utf-8-sig", newline=newline)


def content(path: Path) -> bytes:
    with _unpacking(path):
        return gzip.decompress(path.read_bytes()) if _gzipped(path) else path.read_bytes()


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"'{path}' is truncated or not gzip ({error}): download or create it again.") from None


def _gzipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    # opened as text, a line ends at \n, \r\n and \r and nowhere else; str.splitlines would also cut at U+2028
    try:
        with opened_text(path) as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError:
        raise not_utf8(path) from None


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}, line {line}): save it as UTF-8.") from error


def not_utf8(path: Path) -> UserError:
    try:
        decoded(content(path), str(path))
    except UserError as error:
        return error
    return UserError(f"{path} is not UTF-8 text: save it as UTF-8.")
