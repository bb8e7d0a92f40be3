"""Run directories with plausible, known numbers and pictures, made without training.

python -m tests.report.synthetic DIRECTORY      a whole sweep, to look at its report
"""

from __future__ import annotations

import copy
import json
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from draftplus.config import Config, load_config, to_dict

PROMPTS = ["an owl", "a crab", "a koala", "a snail"]
IMAGES = 12
BASE = (12.0, 0.35)  # reward, LPIPS


def trade_off(method: str, k: object, kl: float, done: float, seed: int) -> tuple[float, float]:
    """Reward and LPIPS after a fraction of training, on a smooth and known law with a little noise over seeds."""
    noise = np.random.default_rng([seed, int(1000 * kl), len(method), zlib.crc32(str(k).encode()) % 97])
    strength = done / (1 + kl)
    speed = {"ddpo": 0.25, "draft_lv": 1.15}.get(method, 1.0 if k == 1 else 0.8)
    gain = 4.0 * (1 - math.exp(-2 * speed * strength))
    kept = 1 - (0.75 if kl == 0 else 0.62) * (gain / 4.0) ** 1.7
    wobble = noise.normal(0, [0.12, 0.006]) if done > 0 else np.zeros(2)
    return BASE[0] + gain + float(wobble[0]), BASE[1] * kept + float(wobble[1])


def configuration(settings: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration; `changes` are set without a check, dotted."""
    config: dict[str, Any] = to_dict(load_config(None, [*settings]) if settings else Config())
    config = copy.deepcopy(config)
    for key, value in changes.items():
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def write_run(
    directory: Path, changes: Mapping[str, Any] | None = None, steps: int = 60, every: int = 20,
    rewards: Iterable[str] = ("emoji_clip",), done_steps: int | None = None, pictures: bool = True,
    variants: bool = False, prompts: Sequence[str] = PROMPTS,
) -> Path:  # fmt: skip
    """A run directory. done_steps: how far it got; None means to its end."""
    directory.mkdir(parents=True)
    sampler = {"sampler.steps": 10, "sampler.guidance_scale": 1.75, "sampler.negative_prompt": ""}
    config = configuration([], {**sampler, "train.steps": steps, "eval.every": every, **(changes or {})})
    (directory / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    objective, seed = config["objective"], config["seed"]
    law = (objective["method"], objective["grad_steps"], objective["kl_coeff"])
    reached = steps if done_steps is None else done_steps
    draw = np.random.default_rng([seed, 7])
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, reached + 1):
            reward, _ = trade_off(*law, step / steps, seed)
            row = {
                "step": step, "loss": -reward, "reward": reward + draw.normal(0, 0.5), "grad_norm": 2.0,
                "kl": (0.02 if law[2] else 0.0) * step / steps / (0.3 + law[2]), "lr": 1e-3, "seconds": 2.5,
                "clipped_fraction": 0.1, "images": 8 * step, "skipped": 0,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    evaluated = [step for step in range(0, reached + 1) if step % every == 0 or step == steps]
    rows = []
    for step in evaluated:
        reward, lpips = trade_off(*law, step / steps, seed)
        values = reward + np.random.default_rng(3).normal(0, 1.0, len(prompts) * IMAGES)
        values += reward - values.mean()
        row = {
            "step": step, "reward": reward, **{f"reward/{name}": reward for name in rewards}, "lpips": lpips,
            "images": len(values), "seconds": 9.0, "per_image": {name: values.tolist() for name in rewards},
            "lpips_per_prompt": {prompt: lpips + 0.01 * i for i, prompt in enumerate(prompts)},
        }  # fmt: skip
        if variants and step == reached:
            row["variants"] = [_whole(variant, row) for variant in _variants(rewards, reward, lpips)]
        rows.append(row)
        if pictures:
            write_pictures(directory / "samples", step, prompts, seed, lpips / BASE[1])
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "samples").mkdir(exist_ok=True)
    (directory / "samples" / "prompts.json").write_text(json.dumps(list(prompts)))
    best = max(rows, key=lambda row: row["reward"] if row["step"] else -math.inf)
    told = {"step": best["step"], "value": best["reward"], "rule": "highest mean of emoji_clip"}
    (directory / "best.json").write_text(json.dumps(told))
    (directory / "adapter").mkdir()
    return directory


def _variants(rewards: Iterable[str], reward: float, lpips: float) -> list[dict[str, Any]]:
    gain, lost = reward - BASE[0], BASE[1] - lpips
    ways: list[tuple[str, float | None, str | None, float]] = [
        *((f"lora_scale={scale}", scale, None, scale) for scale in (0.25, 0.5, 0.75)),
        *((f"anneal={how}", None, how, at) for how, at in (("power:2", 0.55), ("linear", 0.7), ("step:0.5", 0.45))),
    ]
    return [
        {
            "label": label, "lora_scale": scale, "anneal": anneal, "checkpoint": None, "reward": BASE[0] + gain * at,
            **{f"reward/{name}": BASE[0] + gain * at for name in rewards},
            "lpips": BASE[1] - lost * at ** (1.3 if anneal is None else 1.9), "images": 48,
        }
        for label, scale, anneal, at in ways
    ]  # fmt: skip


def _whole(variant: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A variant with numbers of each image and prompt, as far from its means as the row's are from its own."""
    return {
        **variant,
        "per_image": {
            name: [value - row["reward"] + variant["reward"] for value in values]
            for name, values in row["per_image"].items()
        },
        "lpips_per_prompt": {
            prompt: value - row["lpips"] + variant["lpips"] for prompt, value in row["lpips_per_prompt"].items()
        },
    }


def write_pictures(samples: Path, step: int, prompts: Sequence[str], seed: int, variety: float) -> None:
    """A face for each prompt and seed: the less variety, the nearer to one face for each prompt."""
    target = samples / f"step-{step:06d}"
    target.mkdir(parents=True)
    for index, prompt in enumerate(prompts):
        for i in range(IMAGES):
            own = np.random.default_rng([index, i])
            mean = np.random.default_rng([index, 99])
            mix = own.random(8) * variety + mean.random(8) * (1 - variety)
            face(mix).save(target / f"{index:02d}-{prompt.replace(' ', '-')}-{index * IMAGES + i}.png")


def face(numbers: Sequence[float]) -> Image.Image:
    """A 64x64 picture of eight numbers in [0, 1]."""
    import colorsys

    def colour(hue: float, light: float) -> tuple[int, int, int]:
        red, green, blue = colorsys.hls_to_rgb(hue, light, 0.6)
        return int(255 * red), int(255 * green), int(255 * blue)

    picture = Image.new("RGB", (64, 64), colour(numbers[0], 0.85))
    pen = ImageDraw.Draw(picture)
    radius, x, y = 16 + 12 * numbers[1], 24 + 16 * numbers[2], 26 + 12 * numbers[3]
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour(numbers[4], 0.55))
    for side in (-1, 1):
        eye = x + side * radius * (0.3 + 0.2 * numbers[5])
        pen.ellipse((eye - 4, y - 8, eye + 4, y), fill="white")
        pen.ellipse((eye - 2, y - 6, eye + 2, y - 2), fill="black")
    pen.arc((x - 8, y, x + 8, y + 6 + 8 * numbers[6]), 10, 170, fill="black", width=2)
    return picture


def write_sweep(directory: Path, seeds: Iterable[int] = (0, 1, 2), pictures: bool = True) -> Path:
    """A sweep as an honest comparison has it: every method, five KL coefficients, three seeds."""
    settings: list[dict[str, Any]] = [
        *({"objective.grad_steps": k} for k in (1, 2, 4)),
        {"objective.method": "draft_lv"},
        *({"objective.kl_coeff": kl} for kl in (0.1, 0.3, 1.0, 3.0, 10.0)),
        {"objective.method": "ddpo", "optim.lr": 3e-4},
    ]
    entries = []
    for one in settings:
        for seed in seeds:
            name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in {**one, "seed": seed}.items())
            plain = one == {"objective.grad_steps": 1}
            write_run(directory / name, {**one, "seed": seed}, every=10, variants=plain, pictures=pictures)
            if plain and seed == 2:
                told = {"step": 50, "reason": "diversity fell below 0.3 of the base model's"}
                (directory / name / "stopped.json").write_text(json.dumps(told))
            entries.append({"name": name, "settings": [f"{k}={v}" for k, v in one.items()], "status": "finished",
                            "error": None, "seconds": 210.0})  # fmt: skip
    entries.append({"name": "lr-100", "settings": ["optim.lr=100"], "status": "failed", "seconds": 12.0,
                    "error": "reward 'emoji_clip' is not finite at the first step (step 1)"})  # fmt: skip
    told = {"draftplus": "0.1.0", "name": directory.name, "recipe": "emoji", "grid": {}, "runs": entries}
    (directory / "manifest.json").write_text(json.dumps(told))
    return directory


if __name__ == "__main__":
    print(write_sweep(Path(sys.argv[1])))
