"""Pictures before and after, side by side: the same place on both sides is the same prompt and the same noise."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from draftplus.report.read import Run

MOST_PROMPTS = 12
MOST_IMAGES = 12  # of a prompt
THUMBNAIL = 192  # pixels; what is larger is scaled down, so that the page stays small
GRID = 1024


def data_uri(path: Path, largest: int = THUMBNAIL) -> str:
    """The picture as a data: address, scaled down to `largest` pixels where it is larger."""
    with Image.open(path) as image:
        if max(image.size) <= largest:
            return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        small = image.convert("RGB")
        small.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
        f'<img class="grid" src="{data_uri(run.grids[step], GRID)}" alt="all pictures at step {step}"></figure>'
        for step in shown
    )
    return f'<div class="pair">{panels}</div>'


def _by_prompt(run: Run, first: int, last: int) -> str:
    prompts = sorted({prompt for step in (first, last) for prompt, _ in run.samples[step]})
    shown = prompts[:MOST_PROMPTS]
    blocks = [_prompt(run, prompt, first, last) for prompt in shown]
    hidden = len(prompts) - len(shown)
    rest = f"<p>{hidden} more prompts are in the run's <code>samples</code> directory.</p>" if hidden else ""
    return "".join(blocks) + rest


def _prompt(run: Run, prompt: int, first: int, last: int) -> str:
    text = run.prompts[prompt] if prompt < len(run.prompts) else f"prompt {prompt}"
    seeds = sorted({seed for step in (first, last) for p, seed in run.samples[step] if p == prompt})[:MOST_IMAGES]
    steps = [first] if first == last else [first, last]
    columns = _columns(len(seeds))
    panels = "".join(
        f"<figure><figcaption>{_label(step, first)}{_variety(run, step, text)}</figcaption>"
        f'<div class="tiles" style="--columns: {columns}; --columns-narrow: {-(-columns // 2)}">'
        + "".join(_tile(run.samples[step].get((prompt, seed)), text, seed, step) for seed in seeds)
        + "</div></figure>"
        for step in steps
    )
    return f'<article><h3>“{escape(text)}”</h3><div class="pair">{panels}</div></article>'


def _tile(path: Path | None, prompt: str, seed: int, step: int) -> str:
    if path is None:
        return '<span class="tile absent"></span>'
    label = escape(f"{prompt}, seed {seed}, step {step}")
    return f'<img class="tile" src="{data_uri(path)}" alt="{label}" title="{label}">'


def _label(step: int, first: int) -> str:
    return f"Before (step {step})" if step == first else f"After (step {step})"


def _variety(run: Run, step: int, prompt: str) -> str:
    per_prompt = (one.held_out.lpips_per_prompt for one in run.evaluations if one.step == step)
    value = next(per_prompt, {}).get(prompt)
    return f", LPIPS {value:.3f}" if isinstance(value, float) else ""


def _columns(n: int) -> int:
    return n if n <= 6 else next((d for d in (6, 5, 4) if n % d == 0), 6)
