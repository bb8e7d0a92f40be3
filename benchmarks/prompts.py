"""What a million prompts cost: to pack, and to start training on, beside a file of 15. Linux only.

    python -m benchmarks.prompts
    python -m benchmarks.prompts --prompts 100000 --near 0.8

The prompts are made of random words, a twentieth of them repeated, some with other punctuation. Each command runs in a
process of its own; memory is the most that was resident in it. Training takes one step of the embedded model, with one
picture; the difference from 15 prompts, in time of a processor, which a busy machine changes least, is what the set
costs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

WORDS = 20_000
FEW = 15
PACKED, STARTED = (120, 1.0), (10, 0.5)  # seconds and GB that each may take
STEP = [
    "train.steps=1", "train.global_batch_size=1", "train.micro_batch_size=1", "eval.images_per_prompt=2",
    "eval.max_prompts=1", "sampler.steps=2", "device=cpu", "log.to=[]",
]  # fmt: skip


def write_prompts(path: Path, count: int) -> None:
    """Prompts of 3 to 30 words, a twentieth of them again later on."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(WORDS)]
    recent: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if recent and number % 20 == 0:
                prompt = draw.choice(recent).title() + draw.choice(["", ".", "!"])
            else:
                prompt = " ".join(draw.choices(words, k=draw.randint(3, 30)))
                recent = [*recent[-999:], prompt]
            file.write(prompt + "\n")


class Cost(NamedTuple):
    """Seconds by the clock and of a processor, which differ where others use it too, and gigabytes."""

    seconds: float
    processor: float
    gigabytes: float


def measured(arguments: list[str]) -> Cost:
    """What a command costs. RuntimeError where it fails."""
    began = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "draftplus", *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"draftplus {' '.join(arguments)} failed")
    seconds = time.perf_counter() - began
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def told(what: str, cost: Cost, target: tuple[float, float] | None = None) -> str:
    numbers = f"{what:<30}{cost.seconds:7.1f} s {cost.processor:7.1f} s of a processor {cost.gigabytes:6.2f} GB"
    if target is None:
        return numbers
    fits = cost.seconds <= target[0] and cost.gigabytes <= target[1]
    return f"{numbers}   {'within' if fits else 'OVER'} {target[0]} s and {target[1]:g} GB"


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        write_prompts(here / "many.txt", options.prompts)
        write_prompts(here / "few.txt", FEW)
        near = ["--near", str(options.near)] if options.near else []
        pack = measured(["data", "pack", str(here / "many.txt"), "-o", str(here / "many"), *near])
        print(told(f"packing {options.prompts:,} prompts", pack, PACKED))
        train = ["train", "emoji", *STEP, f"output_dir={here}"]
        few = measured([*train, "name=few", f"data.prompts={here / 'few.txt'}"])
        many = measured([*train, "name=many", f"data.prompts={here / 'many'}"])
        print(told(f"a step on {FEW} prompts", few))
        print(told("a step on all", many))
        seconds, gigabytes = many.processor - few.processor, many.gigabytes - few.gigabytes
        fits = "within" if seconds <= STARTED[0] and gigabytes <= STARTED[1] else "OVER"
        more = f"{seconds:.1f} s of a processor and {gigabytes:.2f} GB"
        print(f"the set costs {more} more: {fits} {STARTED[0]} s and {STARTED[1]:g} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--near", type=float, default=None)
    main(parser.parse_args())
