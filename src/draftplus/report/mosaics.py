"""Pictures of several runs side by side: the same prompt and noise in each row or column."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from draftplus.report import paper
from draftplus.report.grouping import Comparison, Group, seed_of
from draftplus.report.looks import ON_PAPER
from draftplus.report.pictures import file_of, largest_side
from draftplus.report.points import BASE
from draftplus.report.read import Run

MOST_COLUMNS = 14
MOST_PROMPTS = 6
MOST_SEEDS = 6
MOST_ACROSS = 16  # prompts and seeds of the wide figure
TILE = 128  # pixels


@dataclass(frozen=True)
class Column:
    """One model's pictures, by (prompt index, seed). series: the method, or the base model."""

    label: str
    series: str
    pictures: dict[tuple[int, int], Path]
    note: str
    kl_coeff: float = 0.0


def columns_of(comparison: Comparison) -> list[Column]:
    """The base model, DRaFT+ from the strongest KL term to the weakest, then the methods without, DDPO last."""
    first = next((run for run in comparison.runs if 0 in run.samples), None)
    columns = [Column(BASE, BASE, first.samples[0], "step 0")] if first is not None else []
    for group in sorted(comparison.groups, key=_order):
        run = next((run for run in sorted(group.runs, key=lambda run: str(seed_of(run))) if _tuned(run)), None)
        if run is not None:
            step = max(run.samples)
            note = f"{run.name}, step {step}"
            columns.append(Column(group.label, group.method, run.samples[step], note, group.kl_coeff))
    most = max((len(column.pictures) for column in columns), default=0)
    whole = [column for column in columns if len(column.pictures) > most / 2]  # a half-written one would empty all rows
    return _thinned(whole)


def _thinned(columns: list[Column]) -> list[Column]:
    """At most MOST_COLUMNS, leaving out KL coefficients in between before anything else."""
    while len(columns) > MOST_COLUMNS:
        inner = [i for i, c in enumerate(columns) if c.kl_coeff > 0][1:-1]
        columns = [c for i, c in enumerate(columns) if i != (inner[len(inner) // 2] if inner else len(columns) - 1)]
    return columns


def left_out(comparison: Comparison) -> list[str]:
    """The models that have pictures and no column."""
    shown = {column.label for column in columns_of(comparison)}
    return [g.label for g in comparison.groups if g.label not in shown and any(_tuned(run) for run in g.runs)]


def _order(group: Group) -> tuple[bool, bool, str, float]:
    return group.method.startswith("DDPO"), group.kl_coeff == 0, "" if group.kl_coeff else group.method, -group.kl_coeff


def _tuned(run: Run) -> bool:
    return bool(run.samples) and max(run.samples) > 0


def common_pictures(columns: Sequence[Column]) -> dict[int, list[int]]:
    """The seeds of each prompt that every column has a picture of."""
    keys = set.intersection(*(set(column.pictures) for column in columns)) if columns else set()
    told: dict[int, list[int]] = {}
    for prompt, seed in sorted(keys):
        told.setdefault(prompt, []).append(seed)
    return told


def largest_of(columns: Sequence[Column]) -> int:
    """How large the page's pictures of these columns may be, in pixels of a side."""
    grids = [min(len(seeds), MOST_SEEDS) for seeds in list(common_pictures(columns).values())[:MOST_PROMPTS]]
    return largest_side(len(columns) * (sum(grids) + len(across(columns))))


def same_seed_grids(columns: Sequence[Column], prompts: Sequence[str], numbers: dict[str, int]) -> str:
    """HTML of a grid for each prompt: rows are seeds, columns are models."""
    blocks, largest = [], largest_of(columns)
    for n, (prompt, seeds) in enumerate(list(common_pictures(columns).items())[:MOST_PROMPTS]):
        head = "".join(
            f'<th scope="col" class="whole" data-series="{numbers[c.series]}" title="{escape(c.note)}">'
            f"{_broken(c.label)}</th>"
            for c in columns
        )
        rows = "".join(
            f'<tr><th scope="row">{seed}</th>'
            + "".join(_cell(c, prompt, seed, _text(prompts, prompt), numbers, largest) for c in columns)
            + "</tr>"
            for seed in seeds[:MOST_SEEDS]
        )
        blocks.append(
            f'<div class="prompt" data-prompt="{n}"{" hidden" if n else ""}><h4>“{escape(_text(prompts, prompt))}”</h4>'
            f'<div class="scroll"><table class="mosaic"><thead><tr><th scope="col">seed</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div></div>"
        )
    return "".join(blocks)


def many_prompts(columns: Sequence[Column], prompts: Sequence[str], numbers: dict[str, int]) -> str:
    """HTML of one wide grid: rows are models, columns are prompts with some seeds of each."""
    chosen, largest = across(columns), largest_of(columns)
    head = "".join(f'<th scope="col">{escape(_text(prompts, p))}<br><small>seed {s}</small></th>' for p, s in chosen)
    rows = "".join(
        f'<tr data-series="{numbers[c.series]}"><th scope="row" title="{escape(c.note)}">{_broken(c.label)}</th>'
        + "".join(_cell(c, p, s, _text(prompts, p), None, largest) for p, s in chosen)
        + "</tr>"
        for c in columns
    )
    return (
        f'<div class="scroll"><table class="mosaic"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def across(columns: Sequence[Column]) -> list[tuple[int, int]]:
    """The prompts and seeds of the wide grid: as many prompts as fit, with as many seeds each."""
    common = common_pictures(columns)
    if not common:
        return []
    stride = -(-len(common) // MOST_ACROSS)
    chosen = list(common)[::stride]
    each = max(1, MOST_ACROSS // len(chosen))
    return [(prompt, seed) for prompt in chosen for seed in common[prompt][:each]]


def _cell(
    column: Column, prompt: int, seed: int, text: str, numbers: dict[str, int] | None, largest: int
) -> str:  # fmt: skip
    label = escape(f"{text}, seed {seed}, {column.label}")
    series = f' data-series="{numbers[column.series]}"' if numbers is not None else ""
    path = column.pictures[prompt, seed]
    told = f'alt="{label}" title="{label}" data-file="{file_of(path)}"'
    return f'<td{series}><img class="tile" loading="lazy" src="{jpeg_uri(thumbnail(path, largest))}" {told}></td>'


def _broken(label: str) -> str:
    return "<br>".join(
        escape(part).replace("β = ", "β&nbsp;=&nbsp;").replace("λ = ", "λ&nbsp;=&nbsp;") for part in label.split(", ")
    )


def _text(prompts: Sequence[str], index: int) -> str:
    return prompts[index] if index < len(prompts) else f"prompt {index}"


def thumbnail(path: Path, largest: int = TILE) -> Image.Image:
    """The picture, scaled down to `largest` pixels where it is larger."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    return small


def jpeg_uri(image: Image.Image, quality: int = 90) -> str:
    """The picture as a data: address."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def contact_sheet(run: Run, step: int, prompts: int = 3, images: int = 4, size: int = 48) -> str | None:
    """A few of a run's pictures at a step in one, a row for each prompt, as a data: address; None without pictures."""
    pictures = run.samples.get(step)
    if not pictures:
        return None
    rows: dict[int, list[Path]] = {}
    for (prompt, _), path in sorted(pictures.items()):
        rows.setdefault(prompt, []).append(path)
    shown = [paths[:images] for paths in list(rows.values())[:prompts]]
    sheet = Image.new("RGB", (images * (size + 2) - 2, len(shown) * (size + 2) - 2), "white")
    for r, paths in enumerate(shown):
        for c, path in enumerate(paths):
            with Image.open(path) as image:
                sheet.paste(image.convert("RGB").resize((size, size)), (c * (size + 2), r * (size + 2)))
    return jpeg_uri(sheet, 85)


def save_grid(columns: Sequence[Column], prompts: Sequence[str], prompt: int, directory: Path, name: str) -> list[Path]:
    """Writes one prompt's same-seed grid as PNG and SVG."""
    seeds = common_pictures(columns)[prompt][:MOST_SEEDS]
    cells = [[column.pictures[prompt, seed] for column in columns] for seed in seeds]
    title = f"“{_text(prompts, prompt)}”: the same noise in each row"
    return _save(cells, [f"seed {s}" for s in seeds], [c.label for c in columns], title, directory, name)


def save_many(columns: Sequence[Column], prompts: Sequence[str], directory: Path, name: str) -> list[Path]:
    """Writes the wide grid as PNG and SVG."""
    chosen = across(columns)
    cells = [[column.pictures[key] for key in chosen] for column in columns]
    heads = [f"{_text(prompts, p)}\nseed {s}" for p, s in chosen]
    return _save(cells, [c.label for c in columns], heads, "The same noise in each column", directory, name)


def _save(
    cells: Sequence[Sequence[Path]], rows: Sequence[str], columns: Sequence[str], title: str, directory: Path, name: str
) -> list[Path]:
    unit, gap, left, top = 0.9, 0.05, 1.5, 0.85  # inches
    width, height = left + len(columns) * (unit + gap) + 0.1, top + len(rows) * (unit + gap) + 0.1
    sheet = _sheet(cells, round(TILE * gap / unit))
    with rc_context(ON_PAPER.style()):
        figure = Figure(figsize=(width, height), facecolor=ON_PAPER.page)
        figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", fontsize=11, color=ON_PAPER.text)
        extent = (len(columns) * (unit + gap) - gap, len(rows) * (unit + gap) - gap)
        bottom = height - top - extent[1]
        axes = figure.add_axes((left / width, bottom / height, extent[0] / width, extent[1] / height))
        axes.imshow(sheet, aspect="auto", interpolation="nearest")  # a pixel of the sheet is one of the file
        axes.set_axis_off()
        for r, text in enumerate(rows):
            y = height - top - r * (unit + gap) - unit / 2
            figure.text((left - 0.1) / width, y / height, textwrap.fill(text, 20), ha="right", va="center",
                        fontsize=8.5, color=ON_PAPER.text)  # fmt: skip
        for c, text in enumerate(columns):
            x = left + c * (unit + gap) + unit / 2
            head = text if "\n" in text else textwrap.fill(text, 14)
            figure.text(x / width, 1 - (top - 0.06) / height, head, ha="center", va="bottom", fontsize=7.5,
                        color=ON_PAPER.text)  # fmt: skip
        return paper.save(figure, directory, name, TILE / unit)


def _sheet(cells: Sequence[Sequence[Path]], gap: int) -> Image.Image:
    """All pictures in one, on white."""
    step = TILE + gap
    sheet = Image.new("RGB", (len(cells[0]) * step - gap, len(cells) * step - gap), "white")
    for r, row in enumerate(cells):
        for c, path in enumerate(row):
            with Image.open(path) as image:
                tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (c * step, r * step))
    return sheet
