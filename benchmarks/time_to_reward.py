"""What it takes to a held-out gain in reward: seconds and passes of the denoiser, for each method, in one run.

    python -m benchmarks.time_to_reward                        # an hour and a half on two cores; goes on where it was
    python -m benchmarks.time_to_reward --device cuda --gain 0.5 --only DRaFT-1 'gate 3/4, 8 uses'

Every method trains the embedded model with 20 sampling steps and one of them with gradient, from the same seeds, and is
evaluated every 5 steps on all held-out prompts. A gain is read off where the line through these evaluations crosses it
first. Passes are those of the denoiser for one image, each doubled by guidance: without gradient, with gradient (which
cost three times as much: forwards, and both halves of the backward), and of the frozen model for a KL term. Seconds are
those of the training steps, without the evaluations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import draftplus

GAIN, STEPS, EVERY, IMAGES = 1.0, 80, 5, 6
COMMON = [
    "sampler.steps=20", "optim.lr=3e-3", f"eval.every={EVERY}", "eval.max_prompts=15",
    f"eval.images_per_prompt={IMAGES}", "checkpoint.keep=1", "log.to=[]",
]  # fmt: skip
PATH = ["objective.kl_steps=trajectory", "objective.kl_prefix_coeff=30"]
METHODS = {
    "DRaFT-1": [],
    "DRaFT+, β = 10": ["objective.kl_coeff=10"],
    "KL before the window, 30": PATH,
    "gate 1/2": ["objective.gate=0.5"],
    "gate 1/2, 4 uses": ["objective.gate=0.5", "train.prefix_cache.uses=4"],
    "gate 3/4, 4 uses": ["objective.gate=0.75", "train.prefix_cache.uses=4"],
    "gate 3/4, 8 uses": ["objective.gate=0.75", "train.prefix_cache.uses=8"],
}


@dataclass(frozen=True)
class Cost:
    """Of one optimizer step for one image, on average: passes of the denoiser, before guidance doubles them."""

    plain: float
    graded: float
    frozen: float

    @property
    def total(self) -> float:
        return self.plain + self.graded + self.frozen

    @property
    def forwards(self) -> float:
        """In forward passes: one with gradient is worth three."""
        return self.plain + 3 * self.graded + self.frozen


def cost(overrides: Sequence[str]) -> Cost:
    """What a step of a method takes, once its cache is full."""
    from draftplus.build import build_model, build_problem, build_rewards
    from draftplus.config import load_config
    from draftplus.distributed import pick_device
    from draftplus.runs.plan import settled
    from draftplus.training.dry_run import passes

    config = settled(load_config("emoji", [*COMMON, *overrides, "device=cpu"]))
    device = pick_device("cpu")
    problem = build_problem(config, build_model(config.model, device), build_rewards(config.reward, device))
    plain, graded, frozen = passes(problem, config.seed)
    drawn_once = problem.sampler.gate * (1 - 1 / config.train.prefix_cache.uses)
    return Cost(plain - drawn_once, graded, frozen)


def reached(rows: Sequence[dict[str, Any]], gain: float) -> float | None:
    """The optimizer step at which the evaluations first show this gain, between two of them; None: never."""
    for before, after in pairwise(rows):
        low, high = (row["reward"] - rows[0]["reward"] for row in (before, after))
        if low < gain <= high:
            return float(before["step"] + (gain - low) / (high - low) * (after["step"] - before["step"]))
    return None


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gain", type=float, default=GAIN)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training, at most (default {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/time_to_reward"))
    chosen = parser.parse_args()
    print(f"| method | steps to a gain of {chosen.gain:g}, by seed | passes per image and step | passes per image | in "
          "forwards | of DRaFT-1's | seconds of training | LPIPS there, % of base |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", flush=True)
    first: float | None = None
    for name in chosen.only:
        each, steps, seconds, kept = cost(METHODS[name]), [], [], []
        for seed in chosen.seeds:
            directory = f"{name}-{seed}".replace("/", "-").replace(", ", "-").replace(" ", "_")
            run = draftplus.train(
                "emoji",
                [*COMMON, *METHODS[name], f"seed={seed}", f"train.steps={chosen.steps}", f"device={chosen.device}",
                 f"output_dir={chosen.output}", f"name={directory}"],
            )  # fmt: skip
            rows = read(run / "eval.jsonl")
            at = reached(rows, chosen.gain)
            steps.append(at)
            if at is None:
                continue
            taken = [row["seconds"] for row in read(run / "metrics.jsonl")]
            seconds.append(sum(taken[: int(at)]) + (at % 1) * taken[min(int(at), len(taken) - 1)])
            low = max(row["step"] for row in rows if row["step"] <= at)
            ends = {row["step"]: row["lpips"] for row in rows}
            share = (at - low) / EVERY
            lpips = ends[low] * (1 - share) + ends.get(low + EVERY, ends[low]) * share
            kept.append(100 * lpips / rows[0]["lpips"])
        told = ", ".join("–" if at is None else f"{at:.0f}" for at in steps)
        if None in steps:
            print(f"| {name} | {told} | {each.total:.1f} | – | – | – | – | – |", flush=True)
            continue
        mean = statistics.fmean(at for at in steps if at is not None)
        passes, forwards = mean * each.total, mean * each.forwards
        first = forwards if name == "DRaFT-1" else first
        share_of_first = "–" if first is None else f"{forwards / first:.2f}"
        print(f"| {name} | {told} | {each.total:.1f} | {passes:.0f} | {forwards:.0f} | {share_of_first} | "
              f"{statistics.fmean(seconds):.0f} | {statistics.fmean(kept):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
