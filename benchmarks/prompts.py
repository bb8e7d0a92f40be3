"""What a million prompts cost: to pack, and to start training on, beside a file of 15. Linux only.

    python -m benchmarks.prompts
    python -m benchmarks.prompts --prompts 100000 --near 0.8

The prompts are made of random words, a twentieth of them repeated, some with other punctuation. Each command runs in a
process of its own; memory is the most that was resident in it. Training takes one step of the embedded model, with one
picture, and the time is until the process has ended: the difference from 15 prompts is what the set costs.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

WORDS = 20_000
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


def measured(arguments: list[str]) -> tuple[float, float]:
    """Seconds and gigabytes of a command. RuntimeError where it fails."""
    began = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "draftplus", *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"draftplus {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def told(what: str, seconds: float, gigabytes: float, target: tuple[float, float]) -> str:
    fits = "within" if seconds <= target[0] and gigabytes <= target[1] else "OVER"
    return f"{what:<36} {seconds:6.1f} s  {gigabytes:5.2f} GB   {fits} {target[0]} s and {target[1]:g} GB"


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        write_prompts(here / "many.txt", options.prompts)
        write_prompts(here / "few.txt", 15)
        near = ["--near", str(options.near)] if options.near else []
        pack = measured(["data", "pack", str(here / "many.txt"), "-o", str(here / "many"), *near])
        print(told(f"packing {options.prompts:,} prompts", *pack, PACKED))
        train = ["train", "emoji", *STEP, f"output_dir={here}", f"eval.prompts={here / 'few.txt'}"]
        few = measured([*train, "name=few", "data.prompts=animals"])
        many = measured([*train, "name=many", f"data.prompts={here / 'many'}"])
        print(told("a step on them", *many, (float("inf"), float("inf"))))
        print(f"{'a step on 45 prompts':<36} {few[0]:6.1f} s  {few[1]:5.2f} GB")
        print(told("what the set costs", many[0] - few[0], many[1] - few[1], STARTED))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--near", type=float, default=None)
    main(parser.parse_args())
