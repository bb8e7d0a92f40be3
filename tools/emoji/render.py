"""Render every picture once, to 96 x 96 RGBA, and keep them as one file."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
import torch
from fetch import NAMES, STYLE_PACKAGES, Package, read
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from subjects import ANIMALS, RENAMED, STYLES, TWINS

SIZE = 96
LEFT_OUT_GROUPS = ("People & Body", "Flags", "Smileys & Emotion")


@dataclass(frozen=True)
class Picture:
    """Where a row of the rendered tensor comes from; `subject` is an animal of ours if `animal`, else any noun."""

    subject: str
    style: str
    animal: bool


def wanted(folder: Path) -> list[tuple[str, str, bool]]:
    """(Unicode name, subject, is an animal) of everything to render."""
    animals = {name: animal for animal, names in ANIMALS.items() for name in names}
    rows = [(name, animal, True) for name, animal in animals.items()]
    for group in json.loads(read(folder, NAMES, "data-by-group.json")):
        for emoji in group["emojis"] if group["name"] not in LEFT_OUT_GROUPS else []:
            name = emoji["slug"].replace("_", "-")
            if name not in animals and name not in TWINS:
                rows.append((name, name.replace("-", " "), False))
    return rows


def code_points(folder: Path) -> dict[str, str]:
    """Unicode name to the file stem of its code points."""
    table = {}
    for emoji, entry in json.loads(read(folder, NAMES, "data-by-emoji.json")).items():
        table[entry["slug"].replace("_", "-")] = "-".join(f"{ord(c):x}" for c in emoji)
    return table


def render(folder: Path, target: Path) -> None:
    """Render all wanted pictures in all styles into one safetensors file of uint8 (n, 4, 96, 96)."""
    rows, images, pictures = wanted(folder), [], []
    points = code_points(folder)
    for style in STYLES:
        package = STYLE_PACKAGES[style]
        draw = _webp(folder, package, points) if style == "3d" else _svg(folder, package, RENAMED.get(style, {}))
        for name, subject, animal in rows:
            image = draw(name, animal)
            if image is not None:
                images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
                pictures.append([subject, style, animal])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    save_file({"images": torch.stack(images).contiguous()}, temporary, metadata={"pictures": json.dumps(pictures)})
    temporary.rename(target)


def load(target: Path) -> tuple[torch.Tensor, list[Picture]]:
    """The rendered pictures, uint8 (n, 4, 96, 96), and what each shows."""
    with safe_open(target, "pt") as file:
        return file.get_tensor("images"), [Picture(*row) for row in json.loads(file.metadata()["pictures"])]


def _svg(folder: Path, package: Package, renamed: dict[str, tuple[str, ...]]):
    data = json.loads(read(folder, package, "icons.json"))
    icons, aliases = data["icons"], data.get("aliases", {})

    def draw(name: str, animal: bool) -> Image.Image | None:
        candidates = renamed.get(name) or (name, name.replace("-", ""))
        for candidate in candidates:
            icon = icons.get(candidate) or icons.get(aliases.get(candidate, {}).get("parent"))
            if icon is not None:
                width = icon.get("width", data.get("width", 16))
                height = icon.get("height", data.get("height", 16))
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                svg += f'width="{SIZE}" height="{SIZE}" xmlns:xlink="http://www.w3.org/1999/xlink">{icon["body"]}</svg>'
                png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
                return Image.open(io.BytesIO(png)).convert("RGBA").resize((SIZE, SIZE))
        return None

    return draw


def _webp(folder: Path, package: Package, points: dict[str, str]):
    with tarfile.open(folder / package.file) as tar:
        files = {m.name.split("/")[-1][:-5]: tar.extractfile(m).read() for m in tar if m.name.endswith(".webp")}

    def draw(name: str, animal: bool) -> Image.Image | None:
        stem = points.get(name, "")
        data = files.get(stem) or files.get(stem.replace("-fe0f", ""))
        if data is None:
            return None
        return Image.open(io.BytesIO(data)).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)

    return draw
