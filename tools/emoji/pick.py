"""Fine-tune on rewards, and let the judge name the animals in the pictures before and after: three seeds, one table.

    python tools/emoji/pick.py emoji_clip emoji_pick=build/emoji_pick --build-dir build/emoji

A reward is the embedded one or NAME=DIRECTORY of a CLIPModel. Each run continues where it was stopped, and neither a
finished run nor its pictures are made twice. The judge and the fifteen animals are in no training: not in a reward's
pairs (pairs.py), not in the prompts. It needs the stages fetch, render and judge of build.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from judge import Judge
from judge import load as load_judge
from quality import save_grid
from safetensors.torch import load_file, save_file
from subjects import ANIMALS, HELD_OUT, prompt

import draftplus
from draftplus.metrics.lpips import mean_pairwise_lpips

# The embedded model without guidance, one pass per step instead of two: its pictures are soft and often not the animal,
# so there is something to gain that can be seen. With the guidance that it is meant to be used with, the judge names
# more than nine of ten animals before any fine-tuning.
SETTINGS = ("sampler.steps=6", "sampler.guidance_scale=1")
TRAINING = ("train.steps=40", "optim.lr=3e-3", "objective.kl_coeff=1", "eval.every=1000", "eval.max_prompts=1",
            "eval.images_per_prompt=2", "checkpoint.keep=1")  # fmt: skip
FIRST_SEED = 100


def pictures(target: Callable[[], str], file: Path, images: int, settings: Sequence[str]) -> torch.Tensor:
    """The held-out animals, `images` of each from the same noise for every target: (15·images, 3, 64, 64)."""
    if not file.exists():
        prompts, seeds = [prompt(animal) for animal in HELD_OUT], range(FIRST_SEED, FIRST_SEED + images)
        made = draftplus.generate(target(), prompts, seeds, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": made.contiguous()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    return load_file(file)["images"]


def trained(run: Path, overrides: Sequence[str]) -> str:
    """The run of these overrides, in which it is trained on if it is not finished."""
    return str(draftplus.train("emoji", [f"output_dir={run.parent}", f"name={run.name}", *overrides]))


@torch.no_grad()
def measure(images: torch.Tensor, judge: Judge, rewards: dict[str, draftplus.Reward]) -> dict[str, float]:
    """What the judge, LPIPS and the rewards say of pictures (15·n, 3, 64, 64) of the held-out animals."""
    each = len(images) // len(HELD_OUT)
    wanted = torch.tensor([list(ANIMALS).index(animal) for animal in HELD_OUT]).repeat_interleave(each)
    logits = torch.cat([judge(part)[0] for part in images.split(64)])
    captions = [prompt(animal) for animal in HELD_OUT for _ in range(each)]
    scores = {name: reward(images, captions).mean().item() for name, reward in rewards.items()}
    return {
        "judge %": 100 * (logits.argmax(1) == wanted).float().mean().item(),
        "LPIPS": mean(mean_pairwise_lpips(part) for part in images.split(each)),
        **scores,
    }


def row(label: str, measured: list[dict[str, float]], base: dict[str, float]) -> str:
    """One line of the table: mean ± standard deviation over seeds, LPIPS also in percent of the base model's."""
    cells = []
    for key in base:
        values = [one[key] for one in measured]
        spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
        share = f" ({100 * mean(values) / base[key]:.0f}%)" if key == "LPIPS" else ""
        cells.append(f"{mean(values):.{3 if key == 'LPIPS' else 1}f}{spread}{share}")
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="+", metavar="emoji_clip|NAME=DIRECTORY")
    parser.add_argument("--build-dir", type=Path, default=Path("build/emoji"), help="where the judge is")
    parser.add_argument("--out", type=Path, default=Path("runs/pick"), help="where runs, pictures and the grid go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=8, help="per animal")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the training, over those here")
    arguments = parser.parse_args()
    places = {one.partition("=")[0]: one.partition("=")[2] or None for one in arguments.rewards}
    judge = load_judge(arguments.build_dir / "judge.pt")
    rewards = {name: draftplus.load_reward("emoji_clip", path) for name, path in places.items()}
    sampler = [*SETTINGS, *(one for one in arguments.set if one.startswith("sampler."))]
    base = pictures(lambda: "emoji", arguments.out / "base.safetensors", arguments.images, sampler)
    before = measure(base, judge, rewards)
    grids, rows = [base], [row("base model", [before], before)]
    for name, path in places.items():
        made = []
        for seed in arguments.seeds:
            chosen = [] if path is None else [f"reward.emoji_clip.path={path}"]
            run, overrides = arguments.out / f"{name}-seed{seed}", [*chosen, f"seed={seed}", *arguments.set]
            train = partial(trained, run, [*SETTINGS, *TRAINING, *overrides])
            made.append(pictures(train, run / "held-out.safetensors", arguments.images, sampler))
        grids.append(made[0])
        rows.append(row(name, [measure(images, judge, rewards) for images in made], before))
    print("\n| reward | " + " | ".join(before) + " |\n|" + " --- |" * (len(before) + 1))
    print("\n".join(rows))
    few = torch.cat([images[i : i + 4] for i in range(0, len(base), arguments.images) for images in grids])
    save_grid(few, 4 * len(grids), arguments.out / "grid.png")
    print(f"{arguments.out / 'grid.png'}: four pictures of each animal by {', '.join(['the base model', *places])}")


if __name__ == "__main__":
    main()
