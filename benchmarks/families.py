"""What training and sampling cost for every family, on small random pipelines, against what the stock modules take.

    python -m benchmarks.families                       minutes on a quiet core
    python -m benchmarks.families --cpu-time            on a busy machine, with OMP_NUM_THREADS=1

- step: a DRaFT+ step (10 sampling steps, the last with gradient, KL on, LoRA of rank 8 on attention, float32) over the
  passes that it needs, called on the networks themselves with their inputs at hand: the forward passes of the denoiser
  with adapters folded, the one with adapters and gradient, the one of the frozen model, decoding, the reward's network,
  a backward pass and an update.
- generate: the pictures of two prompts by a loaded model, over the same pictures by the stock pipeline of the same
  directory, embedding the prompts included on both sides. That they are the same is checked.

The pipelines are those of the tests, made wider until a step takes a second or more. Ratios are medians over
interleaved repeats. Exit status 1 above a target.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import floor, recorded, take_step, training
from benchmarks.step import measure
from draftplus.build import build_model, build_rewards, quiet_libraries
from draftplus.config import load_config
from draftplus.evaluation.generate import generate_images
from draftplus.evaluation.knobs import jobs_of
from draftplus.models.families import FAMILIES
from draftplus.runs.plan import settled
from tests.families.cases import CASES, Case
from tests.support.pipelines import PIPELINES, lively, stock

TARGETS = {"step": 1.10, "generate": 1.05}
SIZE, STEPS, SEED = (256, 128), 10, 7
SIZES = {"sd": (64, 48)}  # whose decoder makes twice the size of its latents, not eight times
PROMPTS = ["a cat on a mat", "two dogs"]
# by what the widths of a network are called in its configuration
FACTORS = {
    "block_out_channels": 4, "base_dim": 4, "num_attention_heads": 4, "n_heads": 4, "n_kv_heads": 4, "dim": 4,
    "caption_projection_dim": 4,
}  # fmt: skip


def wide(name: str) -> Any:
    """The pipeline of the tests of that name, with a wider denoiser and decoder."""
    pipe = PIPELINES[name]()
    for part in ("unet" if hasattr(pipe, "unet") else "transformer", "vae"):
        network = getattr(pipe, part)
        config = dict(network.config)
        for key in FACTORS.keys() & config.keys():
            config[key] = _times(config[key], FACTORS[key])
        setattr(pipe, part, lively(type(network).from_config(config), 1))
    return pipe


def _times(value: Any, factor: int) -> Any:
    return value and (value * factor if isinstance(value, int) else [one * factor for one in value])


def cases() -> dict[str, str]:
    """The first tiny pipeline of each family, by the class of its stock pipeline."""
    found: dict[str, str] = {}
    for name in PIPELINES:
        found.setdefault(type(PIPELINES[name]()).__name__, name)
    return {family: found[family] for family in FAMILIES}


def works(name: str, directory: Path) -> dict[str, Callable[[], Any]]:
    """What is to be timed of a family: step and floor, generate and stock."""
    case, size = CASES.get(name, Case(negative=False)), SIZES.get(name, SIZE)
    wide(name).save_pretrained(directory)
    negative = "blurry" if case.negative else None
    config = settled(
        load_config(
            "emoji",
            [f"model.path={directory}", "objective.kl_coeff=0.1", "model.lora.rank=8", "train.global_batch_size=2",
             "train.micro_batch_size=2", *case.overrides(size, STEPS, case.guided, negative)],
        )
    )  # fmt: skip
    device = torch.device("cpu")
    model: Any = build_model(config.model, device)
    setup, state = training(config, model, build_rewards(config.reward, device))
    passes = recorded(setup, state)
    frozen: Any = build_model(config.model, device, trainable=False)
    pipe = stock(directory)
    pipe.set_progress_bar_config(disable=True)
    told = case.call(size, STEPS, case.guided)
    if negative is not None:
        told["negative_prompt"] = [negative] * len(PROMPTS)

    def generate() -> torch.Tensor:
        frozen.encode._rows.clear()
        return generate_images(frozen, jobs_of(PROMPTS, [SEED]), config.sampler)

    def by_stock() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(SEED) for _ in PROMPTS]
        images: torch.Tensor = pipe(prompt=[*PROMPTS], generator=generators, output_type="pt", **told).images
        return images

    off = float((generate() - by_stock()).abs().max())
    if off > 1e-3:
        sys.exit(f"{name}: the pictures differ by {off:.1e}, so that their times mean nothing")
    return {
        "step": lambda: take_step(setup, state), "floor": floor(setup, passes), "generate": generate, "stock": by_stock,
    }  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Measures and prints. Returns how many targets were missed."""
    quiet_libraries()
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {'processor' if options.cpu_time else 'wall'} "
        f"time, medians of {options.repeats}\n\n| family | step, s | over its passes | generate, s | over stock | |\n"
        "|---|---|---|---|---|---|", flush=True,
    )  # fmt: skip
    rows, missed = [], 0
    for family, name in cases().items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as directory:
            taken = measure(works(name, Path(directory)), options.repeats, clock)
        pairs = {"step": "floor", "generate": "stock"}
        ratio = {a: statistics.median(x / y for x, y in zip(taken[a], taken[b], strict=True)) for a, b in pairs.items()}
        seconds = {a: statistics.median(taken[a]) for a in pairs}
        over = [a for a in pairs if ratio[a] > TARGETS[a]]
        missed += len(over)
        rows.append({"family": family, "pipeline": name, "seconds": seconds, "ratio": ratio})
        cells = [f"{seconds[a]:.2f} | {ratio[a]:.3f}" for a in pairs]
        print(f"| {family} | {' | '.join(cells)} | {'MISSED: ' + ', '.join(over) if over else 'met'} |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"targets": TARGETS, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return missed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of the timings (default 7)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    parser.add_argument("--only", nargs="+", metavar="PIPELINE", help="such as sdxl or flux_dev")
    parser.add_argument("--json", help="also write the numbers to this file")
    sys.exit(1 if main(parser.parse_args()) else 0)
