"""What `draftplus plan` reckons for the steps that benchmarks/memory.py measures, at the published sizes of models.

    python -m benchmarks.plan sd15                 every resolution, gradient checkpointing on and off
    python -m benchmarks.plan sdxl --sizes 512

No weights are made. The step is that of benchmarks/memory.py, whose layers of bfloat16 go through float32; both
numbers are GiB above the loaded model and reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from benchmarks.gpu import settings
from benchmarks.memory import through_float32
from benchmarks.shapes import SHAPES, build, clip_h
from draftplus.build import build_problem, quiet_libraries
from draftplus.planning.measure import Memory, measure
from draftplus.planning.meter import META
from draftplus.planning.subject import Subject


def planned(name: str, size: int, checkpointing: bool, kl: float) -> Memory:
    """Of a step of one image."""
    shape = SHAPES[name]
    config = settings(shape, size, 1, steps=1, kl=kl)
    config.device = "cpu"
    model = build(shape, config.model.lora, META, torch.bfloat16)
    if not checkpointing:
        model.tuned.denoiser.disable_gradient_checkpointing()
        model.vae.disable_gradient_checkpointing()
    rewards = {"pickscore": clip_h(META)}
    return measure(Subject(config, model, rewards, build_problem(config, model, rewards)), 1, 1, "a cat")


def rows(name: str, sizes: list[int], kl: float) -> Iterator[str]:
    for size in sizes:
        for checkpointing in (True, False):
            found = planned(name, size, checkpointing, kl)
            resting = sum(found.weights.values()) + found.trained["optimizer"] + found.trained["average"]
            above = (found.phases["step"] - resting) / 2**30
            yield f"| {SHAPES[name].label} | {size} | {'on' if checkpointing else 'off'} | {above:.2f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="in pixels (default 256 512)")
    parser.add_argument("--kl", type=float, default=0.1, help="coefficient of the KL term (default 0.1)")
    parser.add_argument("--native", action="store_true", help="count layers of bfloat16 as a GPU makes them")
    chosen = parser.parse_args()
    quiet_libraries()
    if not chosen.native:
        through_float32()
    for line in rows(chosen.model, chosen.sizes, chosen.kl):
        print(line, flush=True)
