"""Images a second of DRaFT+ at a model's published size, over its bare passes, plain and with its blocks compiled.

Called by `benchmarks/step.py --model`. Step and floor are those of `benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.shapes import SHAPES, build, clip_h
from draftplus.build import quiet_libraries
from draftplus.errors import UserError

NAMES = {"sd15": "sd15", "sdxl": "sdxl", "sd35": "sd35m", "flux": "flux1"}
COLUMNS = {"step": "step, images/s", "floor": "floor, images/s", "ratio": "step over floor", "memory": "step, peak GiB"}


def main(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measures and prints. Returns the rows, plain and compiled."""
    device, shape = torch.device(options.device), SHAPES[NAMES[options.model]]
    quiet_libraries()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
    shape = gpu.tiny(shape) if options.tiny else shape
    images = options.images or (2 if options.tiny else gpu.images_of(shape, options.size))
    config = gpu.settings(shape, options.size, images, options.steps)
    reward = gpu._tiny_reward() if options.tiny else clip_h(device)
    model = build(shape, config.model.lora, device, torch.bfloat16)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{shape.label}, {options.size} pixels, {images} images in a step of {options.steps} sampling steps, K = 1, "
        f"KL, LoRA of rank 8, on {hardware}, torch {torch.__version__}; medians of {options.repeats}\n\n"
        f"| blocks | {' | '.join(COLUMNS.values())} |\n|---|{'---|' * len(COLUMNS)}", flush=True,
    )  # fmt: skip
    found = {"plain": _row("plain", model, reward, config, options)}
    try:
        model.compile()
    except UserError as error:
        print(f"| compiled | {error} |")
        return found
    began = time.perf_counter()
    gpu.recorded(*gpu.training(config, model, {"pickscore": reward}))
    seconds = time.perf_counter() - began
    found["compiled"] = {**_row("compiled", model, reward, config, options), "compiling": seconds}
    faster = found["compiled"]["step"] / found["plain"]["step"]
    print(
        f"\nThe first compiled step took {seconds:.0f} s; those after it are {faster:.2f} times as fast as plain ones."
    )
    return found


def _row(name: str, model: Any, reward: Any, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    found = gpu.row(model, reward, config, options.repeats, options.minutes / 2)
    print(f"| {name} | {' | '.join(f'{found[key]:.3g}' for key in COLUMNS)} |", flush=True)
    return found
