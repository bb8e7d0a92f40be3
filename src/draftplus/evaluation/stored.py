"""Pictures on disk: files, directories and tar archives, as the images that rewards take."""

from __future__ import annotations

import gzip
import io
import lzma
import math
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from draftplus.data.formats import TARS
from draftplus.errors import UserError

# those that PIL reads in its own process: it hands EPS, say, to another program
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
MOST_PIXELS = 64_000_000  # 768 MB as float32
MOST_BYTES = 256_000_000  # of a file
LONGEST_TEXT = 100_000  # bytes of a caption


class Undecodable(Exception):
    """A picture that is not read, and why."""


@dataclass(frozen=True)
class Stored:
    """A picture on disk. name: below the target that it is from. file: its own, or that of the tar whose `member` it
    is. caption: of the .txt beside it, None where there is none."""

    name: str
    file: Path
    member: str | None = None
    caption: str | None = None

    def __str__(self) -> str:
        return str(self.file) if self.member is None else f"{self.file}/{self.member}"


def find_pictures(targets: Sequence[str | Path]) -> list[Stored]:
    """The pictures of files, directories (with all below them, by name, numbers by their value) and tar archives (in
    their order), each once; hidden ones are left out.

    Raises UserError for a target that is missing, has no picture, or is a tar that is cut short or damaged.
    """
    found: dict[str, Stored] = {}
    for target in targets:
        path = Path(target).expanduser()
        if path.is_dir():
            pictures = [_beside(one, path) for one in sorted(_below(path), key=lambda one: _by_number(one, path))]
        elif not path.is_file():
            raise UserError(f"'{target}': no such picture, directory or .tar file")
        elif path.name.lower().endswith(TARS):
            pictures = _inside(path)
        else:
            pictures = [_beside(path, path.parent)]
        if not pictures:
            raise UserError(f"'{target}' has no pictures; they end in {', '.join(SUFFIXES)}")
        for picture in pictures:
            found.setdefault(str(picture), picture)
    return list(found.values())


def _below(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if _is_picture(path.relative_to(directory).as_posix()) and path.is_file():
            yield path


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))


def _by_number(path: Path, directory: Path) -> list[tuple[bool, int, str]]:
    """2.png before 10.png: a list of prompts in the order of the pictures means it so."""
    parts = re.split(r"(\d+)", path.relative_to(directory).as_posix())
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _beside(picture: Path, directory: Path) -> Stored:
    sidecar, caption = picture.with_suffix(".txt"), None
    if sidecar.is_file() and sidecar != picture:
        with sidecar.open("rb") as file:
            caption = _text(file, str(sidecar))
    return Stored(picture.relative_to(directory).as_posix(), picture, None, caption)


def _text(file: IO[bytes], where: str) -> str:
    data = file.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise UserError(f"{where} is longer than {LONGEST_TEXT:,} bytes, so it is no caption of a picture; remove it")
    try:
        return " ".join(data.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _inside(path: Path) -> list[Stored]:
    pictures, captions = [], {}
    for member, file in _members(path):
        key, _, suffix = member.name.rpartition(".")
        if suffix.lower() == "txt":
            captions[key] = _text(file, f"{path}/{member.name}")
        elif _is_picture(member.name):
            pictures.append(member.name)
    twice = next(
        (name for name, before in zip(sorted(pictures)[1:], sorted(pictures), strict=False) if name == before), ""
    )
    if twice:
        raise UserError(f"'{path}' has two members named {twice}; rename or remove one of them")
    return [Stored(name, path, name, captions.get(name.rpartition(".")[0])) for name in pictures]


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files in an archive, compressed or not, each with its content, which is good until the next is taken.

    Raises UserError where the archive is cut short or damaged.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a million of them stay in memory
                end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                file = tar.extractfile(member) if member.isreg() else None  # no link is followed
                if file is not None:
                    yield member, file
            # a cut between two members looks like the end, but for the block of zeros that stands there
            stream: Any = tar.fileobj
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end mark at byte {end}")
    except (tarfile.TarError, EOFError, ValueError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(f"'{path}' is truncated or not a tar file ({reason}); download or create it again") from error


def read_pictures(pictures: Sequence[Stored]) -> Iterator[tuple[Stored, Tensor | Undecodable]]:
    """Each picture as an image (3, H, W) in [0, 1], or why it is not read; of a tar's pictures in its order."""
    for file, group in groupby(pictures, key=lambda one: one.file):
        wanted = list(group)
        if wanted[0].member is None:
            for one in wanted:
                try:
                    with file.open("rb") as opened:
                        yield one, decoded(opened, file.stat().st_size)
                except (Undecodable, OSError) as error:
                    yield one, Undecodable(str(error))
            continue
        by_name = {one.member: one for one in wanted}
        for member, content in _members(file):
            if member.name in by_name:
                try:
                    yield by_name[member.name], decoded(content, member.size)
                except Undecodable as error:
                    yield by_name[member.name], error


def decoded(file: IO[bytes], size: int) -> Tensor:
    """A picture as (3, H, W) float32 in [0, 1]: turned as its EXIF data say, transparency on white, the first frame.

    Greys of 16 bits keep them. Raises Undecodable for what is damaged, too large, or of 32 bits, whose range is not
    known.
    """
    if size > MOST_BYTES:
        raise Undecodable(f"{size:,} bytes, more than {MOST_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL's own limit, and of damaged EXIF data
            picture: Image.Image = Image.open(io.BytesIO(file.read()), formats=FORMATS)
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise Undecodable(f"{width} x {height} pixels, more than {MOST_PIXELS:,}")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F"):
                raise Undecodable(f"pixels of 32 bits (PIL's mode {picture.mode}); save it with 8 or 16")
            if picture.mode.startswith("I;16"):
                grey = torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 65535)
                return grey.expand(3, *grey.shape).clone()
            if picture.has_transparency_data:
                above = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            pixels = numpy.asarray(picture.convert("RGB"))  # (H, W, 3)
    except UnidentifiedImageError:
        raise Undecodable("not a picture of a known format") from None
    except Image.DecompressionBombError as error:
        raise Undecodable(str(error)) from None
    except Undecodable:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise Undecodable(f"damaged ({str(error) or type(error).__name__})") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255
