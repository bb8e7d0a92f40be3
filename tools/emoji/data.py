"""Pictures on backgrounds with their captions: what every stage trains on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from models import IMAGE_SIZE
from render import Picture, load
from subjects import ALIASES, ANIMALS, BACKGROUNDS, STYLES, article, is_held_out, prompt

SIZES = (54, 56, 58)
COLOURS = torch.tensor(list(BACKGROUNDS.values())) / 255


@dataclass
class Pictures:
    """Rendered pictures, premultiplied RGBA in half precision (n, 4, 96, 96), and the rows of each kind."""

    rgba: torch.Tensor
    rows: list[Picture]

    @classmethod
    def load(cls, path: Path) -> Pictures:
        images, rows = load(path)
        rgba = images.half() / 255
        rgba[:, :3] *= rgba[:, 3:]
        return cls(rgba, rows)

    def animals(self, held_out: bool | None = False) -> list[int]:
        """Rows of the animals: trained pairs (False), held-out pairs (True), or both (None)."""
        return [
            i
            for i, row in enumerate(self.rows)
            if row.animal and held_out in (None, is_held_out(row.subject, row.style))
        ]

    def others(self) -> list[int]:
        """Rows of every other subject."""
        return [i for i, row in enumerate(self.rows) if not row.animal]


def compose(
    rgba: torch.Tensor, colours: torch.Tensor, size: int, flips: torch.Tensor, shifts: torch.Tensor
) -> torch.Tensor:
    """Pictures (b, 4, 96, 96) at `size` pixels on plain backgrounds (b, 3): images (b, 3, 64, 64) in [0, 1].

    flips (b,) bool; shifts (b, 2) in pixels from the centre, clipped so that nothing is cut off.
    """
    small = F.interpolate(rgba.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    small = torch.where(flips.view(-1, 1, 1, 1), small.flip(-1), small).clamp(0, 1)
    room = IMAGE_SIZE - size
    canvas = torch.zeros(len(rgba), 4, IMAGE_SIZE, IMAGE_SIZE)
    corners = (shifts + room // 2).clamp(0, room).tolist()
    for i, (y, x) in enumerate(corners):
        canvas[i, :, y : y + size, x : x + size] = small[i]
    return canvas[:, :3] + (1 - canvas[:, 3:]) * colours.view(-1, 3, 1, 1)


def draw_images(
    pictures: Pictures,
    rows: torch.Tensor,
    backgrounds: torch.Tensor,
    generator: torch.Generator,
    sizes: tuple[int, ...] = SIZES,
    jitter: int = 2,
) -> torch.Tensor:
    """The rows with one random size per call and random flips and shifts: (b, 3, 64, 64)."""
    n = len(rows)
    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    flips = torch.rand(n, generator=generator) < 0.5
    shifts = torch.randint(-jitter, jitter + 1, (n, 2), generator=generator)
    return compose(pictures.rgba[rows], backgrounds, size, flips, shifts)


def random_rows(rows: list[int], n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.tensor(rows)[torch.randint(len(rows), (n,), generator=generator)]


def balanced_weights(pictures: Pictures, rows: list[int]) -> torch.Tensor:
    """Sampling weights that show every (animal, style) pair equally often, whatever its number of pictures."""
    keys = [(pictures.rows[i].subject, pictures.rows[i].style) for i in rows]
    return torch.tensor([1 / keys.count(key) for key in keys])


def caption(picture: Picture, background: int | None, source: random.Random) -> str:
    """A caption that names style and background about half of the time each, sometimes with an alias or bare."""
    style = picture.style if source.random() < 0.5 else None
    ground = list(BACKGROUNDS)[background] if background is not None and source.random() < 0.5 else None
    subject = picture.subject
    if source.random() < 0.15:
        subject = ALIASES.get(subject, subject)
    text = prompt(subject, style, ground)
    return text.removeprefix(article(subject)[: -len(subject)]) if source.random() < 0.1 else text


def vocabulary(pictures: Pictures) -> list[str]:
    """Texts whose words the tokenizer should know, the animals' most of all."""
    texts = [prompt(a, s, b) for a in ANIMALS for s in STYLES for b in BACKGROUNDS]
    texts += [word for word in ALIASES.values() for _ in range(50)]
    texts += sorted({row.subject for row in pictures.rows if not row.animal}) * 5
    return texts
