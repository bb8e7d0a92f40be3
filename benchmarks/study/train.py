"""Trains a run, and measures what its pictures tell beside LPIPS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Task

MEASURES = "diversity.jsonl"
METRICS = ("style_entropy", "style_divergence", "vendi")
BULKY = ("samples", "adapters", "adapter", "checkpoints", "tensorboard")


def prepare() -> None:
    """Imports what training needs, with one thread."""
    import torch

    torch.set_num_threads(1)
    import_module("draftplus.training.train")


def train(task: Task, measures: bool = True, slim: bool = False) -> None:
    """Trains or continues a run as `draftplus train` does, but without its page, which would take as long.

    measures: whether MEASURES is written. slim: whether pictures, weights and checkpoints are removed at the end.
    """
    from draftplus.runs.plan import plan_run
    from draftplus.training.train import train

    config, run = plan_run(task.recipe, task.overrides)
    train(config, run)
    if measures:
        measure(run, task.device)
    if slim:
        for name in BULKY:
            shutil.rmtree(run / name, ignore_errors=True)


class Training:
    """`train` with its options, for another process."""

    prepare = staticmethod(prepare)

    def __init__(self, measures: bool, slim: bool) -> None:
        self.train = partial(train, measures=measures, slim=slim)

    def __call__(self, task: Task) -> None:
        self.train(task)


def measure(run: Path, device: str) -> None:
    """Writes MEASURES: a row for each evaluation, with each metric of the pictures of each prompt.

    The pictures have 8 bits, those that `draftplus evaluate` measures have not been rounded.
    """
    prompts = json.loads((run / "samples" / "prompts.json").read_text(encoding="utf-8"))
    rows = []
    for directory in sorted((run / "samples").glob("step-*")):
        rows.append({"step": int(directory.name.removeprefix("step-")), **_measured(directory, prompts, device)})
    (run / MEASURES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _measured(pictures: Path, prompts: list[str], device: str) -> Mapping[str, list[float]]:
    import numpy as np
    import torch
    from PIL import Image

    from draftplus.metrics.features import vendi_score
    from draftplus.metrics.styles import style_entropy

    features, styles = _instruments(device)
    told: dict[str, list[float]] = {name: [] for name in METRICS}
    for number, prompt in enumerate(prompts):
        arrays = [np.asarray(Image.open(file).convert("RGB")) for file in pictures.glob(f"{number:02d}-*.png")]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W)
        probabilities = styles(images, prompt).double()  # (n, s)
        entropy = float(style_entropy(probabilities.mean(0)))
        told["style_entropy"].append(entropy)
        told["style_divergence"].append(entropy - float(style_entropy(probabilities).mean()))
        told["vendi"].append(vendi_score(features(images)))
    return told


@cache
def _instruments(device: str) -> tuple[Any, Any]:
    from draftplus.build import build_features, build_styles
    from draftplus.distributed import pick_device

    place = pick_device(device)
    return build_features(None, place), build_styles(place)
