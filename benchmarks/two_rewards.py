"""Two rewards whose scales differ several hundredfold, in one sum as they are and with `normalise: base`.

python -m benchmarks.two_rewards                  # three seeds, two runs each; goes on where it was stopped
python -m benchmarks.two_rewards --seeds 0 --weights 8 1

Prints the held-out means of both rewards before and after, and the gains in deviations of the base model's pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import cache
from pathlib import Path

from torch import Tensor

import draftplus
from draftplus.types import Reward

WAYS = {"as they are": "null", "`normalise: base`": "base"}


@cache
def _emoji_clip(device: str) -> Reward:
    return draftplus.load_reward("emoji_clip", device=device)


def hundredth(images: Tensor, prompts: list[str]) -> Tensor:
    """A hundredth of emoji_clip. images: (b, 3, H, W) in [0, 1]. Returns (b,)."""
    return _emoji_clip(str(images.device))(images, prompts) / 100


def saturation(images: Tensor, prompts: list[str]) -> Tensor:
    """How far apart the channels of a pixel lie, on average, in percent. images: (b, 3, H, W). Returns (b,)."""
    return 100 * (images.amax(1) - images.amin(1)).mean((1, 2))


REWARDS = {f"benchmarks.two_rewards:{one.__name__}": one.__name__ for one in (hundredth, saturation)}


def train(way: str, weights: list[float], seed: int, steps: int, output: Path) -> Path:
    """Trains one run. Returns its directory."""
    each = zip(REWARDS, weights, strict=True)
    rewards = ", ".join(f"'{name}': {{weight: {weight}, normalise: {WAYS[way]}}}" for name, weight in each)
    return draftplus.train(
        "emoji",
        [f"reward={{{rewards}}}", f"seed={seed}", f"train.steps={steps}", f"eval.every={steps}", "eval.max_prompts=15",
         "eval.images_per_prompt=4", "sampler.steps=6", "sampler.guidance_scale=1", "optim.lr=3e-3",
         f"output_dir={output}", f"name={WAYS[way]}-{seed}"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs=2, default=[5.0, 1.0], help="of both rewards in the sum")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/two_rewards"))
    chosen = parser.parse_args()
    print("| | " + " | ".join(f"`{name}`, before and after | gain in deviations" for name in REWARDS.values()) + " |")
    print("|---|" + "---|---|" * len(REWARDS))
    for way in reversed(WAYS):  # the normalised runs first, which know the deviations
        runs = [train(way, chosen.weights, seed, chosen.steps, chosen.output) for seed in chosen.seeds]
        scales = json.loads((chosen.output / f"base-{chosen.seeds[0]}" / "reward_scales.json").read_text())["rewards"]
        cells = []
        for name in REWARDS:
            ends = []
            for run in runs:
                rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
                ends.append([rows[0][f"reward/{name}"], rows[-1][f"reward/{name}"]])
            gains = [(after - before) / scales[name]["deviation"] for before, after in ends]
            before, after = (statistics.fmean(column) for column in zip(*ends, strict=True))
            cells += [f"{before:.3g}, {after:.3g}", ", ".join(f"{gain:+.2f}" for gain in gains)]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
