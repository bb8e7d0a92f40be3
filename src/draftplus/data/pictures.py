"""Pictures' files as pixels. What comes from elsewhere may be damaged, or made to fill the memory."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# those that PIL reads in its own process: it hands EPS, say, to another program
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
MOST_PIXELS = 64_000_000
MOST_BYTES = 256_000_000  # of a file


class Undecodable(Exception):
    """A picture that is not read, and why."""


def decode(data: bytes) -> Tensor:
    """A picture as (3, H, W) uint8 RGB: the first frame, turned as its EXIF data say, as `diffusers.utils.load_image`
    does, with transparency on white. Greys of 16 bits are rounded to 8; colours of 16 are cut by PIL.

    Raises Undecodable for what is damaged, too large, or has 32 bits, whose range is not known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL's own limit, and of damaged EXIF data
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MOST_PIXELS:
                raise Undecodable(f"{picture.width} x {picture.height} pixels, more than {MOST_PIXELS:,}")
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in ("I", "F"):
                raise Undecodable(f"pixels of 32 bits (PIL's mode {picture.mode}); save it with 8 or 16")
            if picture.mode.startswith("I;16"):  # PIL would clip them at 255
                grey = (np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8)
                picture = Image.fromarray(grey)
            if picture.has_transparency_data:
                above = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
            pixels = np.array(picture.convert("RGB"))  # (H, W, 3)
    except (Undecodable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Undecodable("not a picture of a known format") from None
    except Image.DecompressionBombError as error:
        raise Undecodable(str(error)) from None
    except Exception as error:  # decoders raise anything on damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise Undecodable(f"damaged ({reason})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
