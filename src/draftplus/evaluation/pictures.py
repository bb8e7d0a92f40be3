"""Images to PNG files and grids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] to an 8-bit picture, rounded as stock diffusers does."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def slug(prompt: str) -> str:
    """A short file name for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"


def picture_name(number: int, prompt: str, seed: int) -> str:
    """The file name of a picture. number: of its prompt."""
    return f"{number:02d}-{slug(prompt)}-{seed}.png"


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """Pictures of one size in rows, on white."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (c * (width + gap), r * (height + gap)))
    return sheet


def save_pictures(images: Tensor, prompts: Sequence[str], seeds: Sequence[int], directory: Path) -> list[Path]:
    """Writes `{prompt number}-{prompt}-{seed}.png` for each image, and grid.png, a row for each prompt.

    images: (n, 3, H, W) in [0, 1]; prompts and seeds: n each, images of one prompt adjacent to one another.
    """
    directory.mkdir(parents=True, exist_ok=True)
    order = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    rows: list[list[Image.Image]] = [[] for _ in order]
    paths = []
    for image, prompt, seed in zip(images, prompts, seeds, strict=True):
        picture = to_pil(image)
        path = directory / picture_name(order[prompt], prompt, seed)
        picture.save(path)
        rows[order[prompt]].append(picture)
        paths.append(path)
    grid(rows).save(directory / "grid.png")
    return paths
