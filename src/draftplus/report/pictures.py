"""Pictures before and after, side by side: the same place on both sides is the same prompt and the same noise."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from html import escape
from pathlib import Path

from PIL import Image

from draftplus.report.read import Run

MOST_PROMPTS = 12
MOST_IMAGES = 12  # of a prompt
GRID = 1024
AS_IT_IS = 192  # pixels of a side; what is larger is a JPEG in the page
SIDES = (1024, 768, 512, 384, 256, 192)  # pixels of the largest side that a page's pictures may have
MOST_PIXELS = 80_000_000  # of all pictures of a page, some 20 MB


def largest_side(pictures: int) -> int:
    """How large this many pictures may be, so that the page that holds them stays light enough to be sent."""
    return next((side for side in SIDES if pictures * side**2 <= MOST_PIXELS), SIDES[-1])


def data_uri(path: Path, largest: int = SIDES[0]) -> str:
    """The picture as a data: address, scaled down to `largest` pixels where it is larger."""
    return _data_uri(path, largest, path.stat().st_mtime_ns)


@lru_cache(maxsize=2 * MOST_PROMPTS * MOST_IMAGES)  # a report is written at every evaluation, with one first step
def _data_uri(path: Path, largest: int, changed: int) -> str:
    with Image.open(path) as image:
        if max(image.size) <= min(largest, AS_IT_IS):
            return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        small = image.convert("RGB")
        small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_of(path: Path) -> str:
    """Where a picture is, from its run's directory on, for the page to tell."""
    return escape("/".join(path.parts[-4:]))


def before_and_after(run: Run) -> str:
    """HTML of the first and the last step's pictures; of the two grids where single pictures are absent."""
    steps = sorted(run.samples)
    if steps:
        return _by_prompt(run, steps[0], steps[-1])
    steps = sorted(run.grids)
    if not steps:
        return "<p>No pictures were found.</p>"
    shown = steps[:1] if len(steps) == 1 else [steps[0], steps[-1]]
    panels = "".join(
        f"<figure><figcaption>{_label(step, steps[0])}</figcaption>"
        f'<img class="grid" src="{data_uri(run.grids[step], GRID)}" alt="all pictures at step {step}" '
        f'data-file="{file_of(run.grids[step])}"></figure>'
        for step in shown
    )
    return f'<div class="pair">{panels}</div>'


def _by_prompt(run: Run, first: int, last: int) -> str:
    prompts = sorted({prompt for step in (first, last) for prompt, _ in run.samples[step]})
    shown = prompts[:MOST_PROMPTS]
    count = sum(prompt in shown for step in {first, last} for prompt, _ in run.samples[step])
    blocks = [_prompt(run, prompt, first, last, largest_side(count)) for prompt in shown]
    hidden = len(prompts) - len(shown)
    rest = f"<p>{hidden} more prompts are in the run's <code>samples</code> directory.</p>" if hidden else ""
    return "".join(blocks) + rest


def _prompt(run: Run, prompt: int, first: int, last: int, largest: int) -> str:
    text = run.prompts[prompt] if prompt < len(run.prompts) else f"prompt {prompt}"
    seeds = sorted({seed for step in (first, last) for p, seed in run.samples[step] if p == prompt})[:MOST_IMAGES]
    steps = [first] if first == last else [first, last]
    columns = _columns(len(seeds))
    panels = "".join(
        f"<figure><figcaption>{_label(step, first)}{_variety(run, step, text)}</figcaption>"
        f'<div class="tiles" style="--columns: {columns}; --columns-narrow: {-(-columns // 2)}">'
        + "".join(_tile(run.samples[step].get((prompt, seed)), text, seed, step, largest) for seed in seeds)
        + "</div></figure>"
        for step in steps
    )
    return f'<article><h3>“{escape(text)}”</h3><div class="pair">{panels}</div></article>'


def _tile(path: Path | None, prompt: str, seed: int, step: int, largest: int) -> str:
    if path is None:
        return '<span class="tile absent"></span>'
    label = escape(f"{prompt}, seed {seed}, step {step}")
    told = f'alt="{label}" title="{label}" data-file="{file_of(path)}"'
    return f'<img class="tile" src="{data_uri(path, largest)}" {told}>'


def _label(step: int, first: int) -> str:
    return f"Before (step {step})" if step == first else f"After (step {step})"


def _variety(run: Run, step: int, prompt: str) -> str:
    per_prompt = (one.held_out.lpips_per_prompt for one in run.evaluations if one.step == step)
    value = next(per_prompt, {}).get(prompt)
    return f", LPIPS {value:.3f}" if isinstance(value, float) else ""


def _columns(n: int) -> int:
    return n if n <= 6 else next((d for d in (6, 5, 4) if n % d == 0), 6)
