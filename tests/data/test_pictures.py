"""Pictures' files as pixels: what stock does, transparency on white, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image

from draftplus.data import pictures
from draftplus.data.pictures import SUFFIXES, Undecodable, decode


def encoded(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def noise(width: int = 8, height: int = 6) -> Image.Image:
    drawn = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(drawn.byte().numpy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_it_is_what_stock_loads(kind: str) -> None:
    data = encoded(noise(), kind)
    stock = np.array(load_image(Image.open(io.BytesIO(data))))
    assert torch.equal(decode(data), torch.from_numpy(stock).permute(2, 0, 1))


def test_it_is_turned_as_stock_turns_it() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(noise(), "JPEG", exif=exif)
    assert decode(data).shape == (3, 8, 6)
    assert torch.equal(
        decode(data), torch.from_numpy(np.array(load_image(Image.open(io.BytesIO(data))))).permute(2, 0, 1)
    )


def test_transparency_is_white() -> None:
    for half, expected in ((0, 255), (255, 10), (128, 132)):
        assert decode(encoded(Image.new("RGBA", (2, 2), (10, 10, 10, half)))).unique().tolist() == [expected]
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30])
    assert decode(encoded(palette, transparency=0)).unique().tolist() == [255]
    assert decode(encoded(palette))[:, 0, 0].tolist() == [10, 20, 30]


def test_16_bits_keep_their_range() -> None:
    """PIL's own conversion cuts them at 255."""
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode(encoded(Image.fromarray(values), kind))[0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture"),  # PIL would start ghostscript
        (encoded(noise(64, 64), "JPEG")[:900], "damaged"),
        (encoded(noise(64, 64))[:900], "damaged"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "32 bits"),
        (encoded(Image.new("1", (8001, 8000))), "8001 x 8000 pixels"),
    ],
)
def test_what_is_no_picture(data: bytes, words: str) -> None:
    with pytest.raises(Undecodable, match=words):
        decode(data)


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = encoded(Image.new("1", (20_000, 10_000)))
    monkeypatch.undo()
    assert len(data) < 100_000
    with pytest.raises(Undecodable, match="200000000 pixels"):
        decode(data)


def test_every_ending_has_a_format() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {known[ending] for ending in SUFFIXES} == set(pictures.FORMATS)
