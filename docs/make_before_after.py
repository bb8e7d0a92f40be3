"""Draws docs/images/before-after.png from a run: the same prompts and seeds, base model left, tuned model right.

Of its first eight prompts; the numbers above are of all.

python docs/make_before_after.py runs/demo
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from PIL import Image

from draftplus.runs.directory import saved_steps, step_name

SCALE, PROMPTS = 2, 8


def main(run: Path) -> None:
    prompts = json.loads((run / "samples" / "prompts.json").read_text(encoding="utf-8"))
    shown = prompts[:PROMPTS]
    steps = saved_steps(run / "samples")
    rows = {row["step"]: row for row in map(json.loads, (run / "eval.jsonl").read_text().splitlines())}
    grids = [Image.open(run / "samples" / step_name(step) / "grid.png") for step in (steps[0], steps[-1])]
    width, height = grids[0].width, grids[0].height * len(shown) // len(prompts)
    grids = [grid.crop((0, 0, width, height)) for grid in grids]
    figure, axes = plt.subplots(1, 2, figsize=(2 * width / 90 + 1, height / 90 + 0.4), dpi=100, sharey=True)
    titles = ("before", f"after {steps[-1]} steps")
    for axis, grid, title, step in zip(axes, grids, titles, (steps[0], steps[-1]), strict=True):
        axis.imshow(grid.resize((width * SCALE, height * SCALE), Image.Resampling.LANCZOS))
        reward = next(value for key, value in rows[step].items() if key.startswith("reward/"))
        axis.set_title(f"{title}: reward {reward:.2f}, LPIPS {rows[step]['lpips']:.3f}", fontsize=9)
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    cell = height * SCALE / len(shown)
    axes[0].set_yticks([cell * (i + 0.5) for i in range(len(shown))], shown, fontsize=8)
    for axis in axes:
        axis.tick_params(length=0)
    figure.tight_layout()
    target = Path(__file__).parent / "images" / "before-after.png"
    figure.savefig(target, bbox_inches="tight", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
