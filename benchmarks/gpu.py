"""What a DRaFT+ step costs at the published sizes of models, with random weights: images a second, and peak memory.

    python -m benchmarks.gpu --json gpu.json                    on one GPU: a table, each row as soon as it is measured
    python -m benchmarks.gpu --only sd15-512 sdxl               some of them
    python -m benchmarks.gpu --device cpu --tiny --sizes 64     the same code on tiny models

A step: 10 sampling steps, the last with gradient (K = 1), KL on, LoRA of rank 8 on attention, frozen weights in
bfloat16, gradient checkpointing of denoiser and decoder, a float32 reward of PickScore's shape (CLIP ViT-H/14), and the
stock pipeline's guidance. Its batch is one micro-batch. Text encoders are left out: embeddings are random.

- step: what training does in a step.
- floor: the passes that it needs, called on the networks themselves, each in the precision in which the step makes it:
  those that the KL term compares are made in float32 without TF32, from frozen weights that are widened for it.
- bf16 floor: the same with all passes of the denoiser in bfloat16.
- memory: the highest that torch has allocated, and how much of it is above the loaded model and reward. Convolutions
  take room for faster algorithms where there is some: with --cap 24 the number is that of a smaller GPU.

Times are medians of interleaved repeats after one that is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import floor, recorded, take_step, training
from benchmarks.shapes import SHAPES, Shape, build, clip_h
from benchmarks.step import measure
from draftplus.build import quiet_libraries
from draftplus.config import Config, load_config
from draftplus.errors import UserError
from draftplus.models.families import FAMILIES

GIB = 2**30
REWARD = "reward.pickscore"  # with random weights it hardly depends on the image, so its weight is large
COLUMNS = {
    "images": "images", "step": "step, images/s", "floor": "floor, images/s", "bf16_floor": "bf16 floor, images/s",
    "ratio": "step over floor", "bf16_ratio": "over bf16 floor", "memory": "step, peak GiB", "above": "above loaded",
    "floor_memory": "floor, peak GiB",
}  # fmt: skip


def images_of(shape: Shape, size: int) -> int:
    """Of a micro-batch."""
    return 1 if shape.pipeline == "FluxPipeline" else 4 if size <= 512 else 2


def settings(shape: Shape, size: int, images: int, steps: int, kl: float = 0.1) -> Config:
    """A run's, with the family's defaults for the sampler."""
    sampler = {**FAMILIES[shape.pipeline].sampler, "steps": steps, "height": size, "width": size}
    told = [f"sampler.{key}={'' if value == '' else json.dumps(value)}" for key, value in sampler.items()]
    batch = [f"train.{key}={images}" for key in ("global_batch_size", "micro_batch_size", "sampling_batch_size")]
    return load_config(
        "sd15",
        [f"objective.kl_coeff={kl}", "model.lora.rank=8", "model.lora.alpha=8", "optim.ema=null",
         f"{REWARD}.weight=1e5", *told, *batch],
    )  # fmt: skip


def row(model: Any, reward: Any, config: Config, repeats: int, minutes: float) -> dict[str, Any]:
    """The numbers of one model and size. minutes: no repeat but the first begins after so many."""
    gpu = model.device.type == "cuda"
    peaks: dict[str, float] = {}

    def watched(name: str, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            work()
            peaks[name] = max(peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / GIB if gpu else 0.0)

        return run

    def clock() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    loaded = torch.cuda.memory_allocated() / GIB if gpu else 0.0
    setup, state = training(config, model, {"pickscore": reward})
    passes = recorded(setup, state)
    works = {"step": lambda: take_step(setup, state), "floor": floor(setup, passes)}
    works["bf16_floor"] = floor(setup, passes, getattr(torch, config.model.dtype))
    taken = measure({name: watched(name, work) for name, work in works.items()}, repeats, clock, clock() + 60 * minutes)
    ratios = {name: statistics.median(a / b for a, b in zip(taken["step"], taken[name], strict=True)) for name in taken}
    images = config.train.global_batch_size
    return {
        "images": images, **{name: images / statistics.median(seconds) for name, seconds in taken.items()},
        "ratio": ratios["floor"], "bf16_ratio": ratios["bf16_floor"], "repeats": len(taken["step"]),
        "memory": peaks["step"], "above": peaks["step"] - loaded, "floor_memory": peaks["floor"],
    }  # fmt: skip


def line(label: str, size: int, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{found[key]:.3g}" if key in found else found["failed"] for key in COLUMNS]
    return f"| {label} | {size} | {' | '.join(cells)} |"


def tiny(shape: Shape) -> Shape:
    """The configurations of the tiny pipeline of a shape's family."""
    from tests.support.pipelines import PIPELINES

    names = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3"}
    pipe = PIPELINES[names.get(shape.pipeline, "flux_dev")]()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    parts = [(type(part).__name__, dict(part.config)) for part in (denoiser, pipe.vae)]
    return Shape(shape.label, shape.pipeline, parts[0], parts[1], shape.scheduler, 8)


def main(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures and prints. Returns the rows."""
    device, began, rows = torch.device(options.device), time.monotonic(), []
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
    quiet_libraries()
    chosen = [
        (name, size) for name, shape in SHAPES.items() for size in options.sizes if shape.pipeline in FAMILIES
        if not options.only or {name, f"{name}-{size}"} & set(options.only)
    ]  # fmt: skip
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, {options.steps} sampling steps\n")
    print(f"| model | size | {' | '.join(COLUMNS.values())} |")
    print(f"|---|---|{'---|' * len(COLUMNS)}", flush=True)
    if options.cap:
        torch.cuda.set_per_process_memory_fraction(options.cap * GIB / torch.cuda.mem_get_info()[1])
    reward = _tiny_reward() if options.tiny else clip_h(device)
    model, held = None, ""
    for at, (name, size) in enumerate(chosen):
        shape = tiny(SHAPES[name]) if options.tiny else SHAPES[name]
        left = options.minutes - (time.monotonic() - began) / 60
        found: dict[str, Any]
        try:
            if left < 0:
                raise TimeoutError
            images = options.images or (2 if options.tiny else images_of(shape, size))
            config = settings(shape, size, images, options.steps)
            if held != name:
                model, held = None, name
                _empty(device)
                model = build(shape, config.model.lora, device, torch.bfloat16)
            found = row(model, reward, config, options.repeats, 0.8 * left / (len(chosen) - at))
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
        except TimeoutError:
            found = {"failed": "no time left"}
        except UserError as error:
            found = {"failed": str(error).splitlines()[0]}
        _empty(device)
        rows.append({"model": name, "size": size, **found})
        print(line(shape.label, size, found), flush=True)
        if options.json:
            told = {"device": hardware, "torch": torch.__version__, "steps": options.steps, "rows": rows}
            Path(options.json).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return rows


def _tiny_reward() -> Any:
    from draftplus.rewards.clip import load_emoji_clip

    return load_emoji_clip()


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda")
    found.add_argument("--steps", type=int, default=10, help="sampling steps (default 10)")
    found.add_argument("--repeats", type=int, default=5, help="at most so many (default 5)")
    found.add_argument("--minutes", type=float, default=8.0, help="to spend in all, about (default 8)")
    found.add_argument("--only", nargs="+", metavar="MODEL", help="such as sdxl, or sdxl-512")
    found.add_argument("--sizes", nargs="+", type=int, default=[512, 1024], help="in pixels (default 512 1024)")
    found.add_argument("--images", type=int, help="of a micro-batch (default 4 at 512 pixels, 2 at 1024; FLUX.1 1)")
    found.add_argument("--cap", type=float, metavar="GIB", help="of a GPU's memory, as if it had no more")
    found.add_argument("--tiny", action="store_true", help="tiny models, which show that the code runs")
    found.add_argument("--json", help="also write the numbers to this file")
    return found


if __name__ == "__main__":
    sys.exit(1 if any("failed" in found for found in main(parser().parse_args())) else 0)
