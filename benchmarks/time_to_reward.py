"""What it takes to a held-out gain in reward: seconds and passes of the denoiser, for each method, in one run.

    python -m benchmarks.time_to_reward                        # about an hour on one core; goes on where it was
    python -m benchmarks.time_to_reward --device cuda --seeds 0 1 2 --only DRaFT-1 'gate 3/4, 8 uses'

Every method trains the embedded model with 20 sampling steps, from the same seeds, and is evaluated every 10 steps on
all 15 held-out prompts, two images each, until it has gained enough. A gain is read off where the line through these
evaluations crosses it first.
Passes are those of the denoiser for one image, each doubled by guidance, from the first step until then; what a cache
saves is counted as it comes, so that its filling is in them. A pass with gradient costs three forward passes: its own,
and both halves of its backward pass. Seconds are those of the training steps, without the evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import draftplus
from draftplus.config.schema import PrefixCacheConfig
from draftplus.training.reuse import source

GAINS, STEPS, EVERY, IMAGES = (0.5, 1.0), 80, 10, 2
COMMON = [
    "sampler.steps=20", "optim.lr=3e-3", f"eval.every={EVERY}", "eval.max_prompts=15",
    f"eval.images_per_prompt={IMAGES}", "checkpoint.keep=1", "log.to=[]",
]  # fmt: skip
FIRST = "DRaFT-1"
METHODS = {
    FIRST: [],
    "DRaFT+, β = 10": ["objective.kl_coeff=10"],
    "KL before the window, 30": ["objective.kl_steps=trajectory", "objective.kl_prefix_coeff=30"],
    "gate 1/2, 8 uses": ["objective.gate=0.5", "train.prefix_cache.uses=8"],
    "gate 3/4, 8 uses": ["objective.gate=0.75", "train.prefix_cache.uses=8"],
    "gate 1/2, DRTune K = 2, 8 uses": [
        "objective.method=drtune", "objective.grad_steps=2", "objective.gate=0.5", "train.prefix_cache.uses=8",
    ],
}  # fmt: skip
HEAD = (
    "method", "gain", "steps, by seed", "passes per image", f"of {FIRST}'s", "in forward passes", f"of {FIRST}'s",
    "seconds", "LPIPS there, % of base",
)  # fmt: skip


class Passes(NamedTuple):
    """Of the denoiser for one image, before guidance doubles them."""

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


@dataclass(frozen=True)
class Cost:
    """What the optimizer steps of a method take.

    step: passes of each, but for the steps before the gate. gate: those, which are taken once for each start noise.
    """

    step: Passes
    gate: int
    reuse: PrefixCacheConfig
    seed: int

    def until(self, at: float) -> Passes:
        """The passes of the first optimizer steps; between two of them as on a line."""
        low, high = (self._first(count) for count in (math.floor(at), math.ceil(at)))
        share = at - math.floor(at)
        return Passes(*((1 - share) * before + share * after for before, after in zip(low, high, strict=True)))

    def _first(self, count: int) -> Passes:
        drawn = len({source(self.reuse, step, self.seed) for step in range(count)})
        plain, graded, frozen = (count * each for each in self.step)
        return Passes(plain + self.gate * drawn, graded, frozen)


def cost(overrides: Sequence[str]) -> Cost:
    """What training of the embedded model takes with these settings."""
    from draftplus.build import build_model, build_problem, build_rewards
    from draftplus.config import load_config
    from draftplus.distributed import pick_device
    from draftplus.runs.plan import settled
    from draftplus.training.dry_run import passes

    config = settled(load_config("emoji", [*COMMON, *overrides, "device=cpu"]))
    device = pick_device("cpu")
    problem = build_problem(config, build_model(config.model, device), build_rewards(config.reward, device))
    plain, graded, frozen = passes(problem, config.seed)
    gate = problem.sampler.gate
    return Cost(Passes(plain - gate, graded, frozen), gate, config.train.prefix_cache, config.seed)


def reached(rows: Sequence[Mapping[str, Any]], gain: float) -> float | None:
    """The optimizer step at which the evaluations first show this gain, between two of them; None: never."""
    for before, after in pairwise(rows):
        low, high = (row["reward"] - rows[0]["reward"] for row in (before, after))
        if low < gain <= high:
            return float(before["step"] + (gain - low) / (high - low) * (after["step"] - before["step"]))
    return None


class Arrival(NamedTuple):
    """What a run took to a gain. at: the optimizer step. lpips: there, in percent of the base model's."""

    at: float
    passes: Passes
    seconds: float
    lpips: float


def arrival(evaluated: Sequence[Mapping[str, Any]], taken: Sequence[float], each: Cost, gain: float) -> Arrival | None:
    """evaluated: the rows of a run's evaluations. taken: the seconds of its steps. None: it never gained as much."""
    at = reached(evaluated, gain)
    if at is None:
        return None
    seconds = sum(taken[: math.floor(at)]) + (at % 1) * taken[math.ceil(at) - 1]
    before, after = next(pair for pair in pairwise(evaluated) if pair[0]["step"] <= at <= pair[1]["step"])
    share = (at - before["step"]) / (after["step"] - before["step"])
    lpips = (1 - share) * before["lpips"] + share * after["lpips"]
    return Arrival(at, each.until(at), seconds, 100 * lpips / evaluated[0]["lpips"])


def lines(found: Mapping[str, Sequence[Arrival | None]], gain: float, first: Passes | None) -> Iterator[str]:
    """Rows of the table, by method, of the runs of all seeds; means over them, and none where one did not arrive.

    first: what the method that others are compared with took.
    """
    for name, runs in found.items():
        there = [run for run in runs if run is not None]
        told = ", ".join("–" if run is None else f"{run.at:.0f}" for run in runs)
        if len(there) < len(runs):
            yield row([name, f"{gain:g}", told, *["–"] * (len(HEAD) - 3)])
            continue
        passes = mean_passes(there)
        ratios = ["–"] * 2
        if first is not None:
            ratios = [f"{passes.total / first.total:.2f}", f"{passes.forwards / first.forwards:.2f}"]
        seconds, lpips = (statistics.fmean(values) for values in zip(*(run[2:] for run in there), strict=True))
        yield row(
            [name, f"{gain:g}", told, f"{passes.total:.0f}", ratios[0], f"{passes.forwards:.0f}", ratios[1],
             f"{seconds:.0f}", f"{lpips:.0f}"]
        )  # fmt: skip


def mean_passes(runs: Sequence[Arrival]) -> Passes:
    return Passes(*(statistics.fmean(values) for values in zip(*(run.passes for run in runs), strict=True)))


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(run: Path, settings: Sequence[str], gain: float, steps: int) -> tuple[list[dict[str, Any]], list[float]]:
    """Trains until it has gained as much, or for so many steps. Returns its evaluations, and the seconds of its steps.

    A run that is there already goes on.
    """
    evaluations = run / "eval.jsonl"
    for limit in range(EVERY, steps + 1, EVERY):
        rows = read(evaluations) if evaluations.is_file() else []
        if rows and reached(rows, gain) is not None:
            break
        if not rows or rows[-1]["step"] < limit:
            last = [f"train.steps={limit}", f"output_dir={run.parent}", f"name={run.name}"]
            draftplus.train("emoji", [*COMMON, *settings, *last])
    return read(evaluations), [step["seconds"] for step in read(run / "metrics.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gains", type=float, nargs="+", default=list(GAINS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training, at most (default {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/time_to_reward"))
    chosen = parser.parse_args()
    print(row(HEAD), row(["---"] * len(HEAD)).replace(" ", ""), sep="\n", flush=True)
    first: dict[float, Passes] = {}
    for name in chosen.only:
        runs = []
        for seed in chosen.seeds:
            settings = [*METHODS[name], f"seed={seed}"]
            run = chosen.output / re.sub(r"\W+", "-", f"{name} {seed}")
            evaluated, taken = train(run, [*settings, f"device={chosen.device}"], max(chosen.gains), chosen.steps)
            runs.append((evaluated, taken, cost(settings)))
        for gain in chosen.gains:
            found = [arrival(*one, gain) for one in runs]
            there = [one for one in found if one is not None]
            if name == FIRST and len(there) == len(found):
                first[gain] = mean_passes(there)
            print(*lines({name: found}, gain, first.get(gain)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
