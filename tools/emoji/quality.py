"""Measure the installed model against the bars of its README: accuracy, variety, ranking, and a grid to look at.

python tools/emoji/quality.py --steps 10 --images 8 --variety 100
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from clip import embed_images
from data import COLOURS, Pictures, draw_images
from diffusers import DDIMScheduler, StableDiffusionPipeline
from judge import Judge, labels
from judge import load as load_judge
from models import encode
from perceptual import Perceptual
from PIL import Image
from subjects import ANIMALS, STYLES, is_held_out, prompt
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "src" / "draftplus" / "assets"
GRID = ("cat", "dog", "rabbit", "lion", "fox", "frog", "pig", "elephant", "penguin", "bee", "whale", "butterfly")
VARIETY = ("cat", "dog", "monkey", "rabbit", "bird", "cow", "tiger", "fish", "frog", "pig", "panda", "snail")


def load_pipeline(folder: Path, spacing: str | None) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if spacing is not None:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    return pipeline


def generate(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance: float
) -> torch.Tensor:
    """One image per prompt, (n, 3, 64, 64) in [0, 1]."""
    parts = []
    for i in range(0, len(prompts), 32):
        chunk = prompts[i : i + 32]
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(chunk))]
        images = pipeline(
            chunk, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
        ).images
        parts.append(images.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def accuracy(judge: Judge, images: torch.Tensor, animals: list[int]) -> tuple[float, list[float]]:
    """Share of images whose animal the judge names, and the same for each animal."""
    right = torch.cat([judge(part)[0].argmax(1) for part in images.split(128)]) == torch.tensor(animals)
    each = [right[torch.tensor(animals) == i].float().mean().item() for i in range(len(ANIMALS))]
    return right.float().mean().item(), each


@torch.no_grad()
def variety(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    perceptual: Perceptual,
    pictures: Pictures,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Per animal: LPIPS among generated images over LPIPS among renders, and the number of styles that appear.

    A style appears if at least two of the images are judged to be in it.
    """
    generator = torch.Generator().manual_seed(11)
    results = {}
    for animal in VARIETY:
        images = generate(pipeline, [prompt(animal)] * arguments.variety, 50_000, arguments.steps, arguments.guidance)
        own = [i for i in pictures.animals() if pictures.rows[i].subject == animal]
        rows = torch.tensor(own)[torch.arange(arguments.variety) % len(own)]
        colours = COLOURS[torch.randint(len(COLOURS), (len(rows),), generator=generator)]
        renders = torch.cat(
            [draw_images(pictures, r, c, generator) for r, c in zip(rows.split(10), colours.split(10), strict=True)]
        )
        counts = judge(images)[1].argmax(1).bincount(minlength=len(STYLES))
        made, real = perceptual.pairwise_mean(images), perceptual.pairwise_mean(renders)
        results[animal] = {
            "lpips": made,
            "lpips_renders": real,
            "ratio": made / real,
            "styles": int((counts >= 2).sum()),
            "styles_trained": len({pictures.rows[i].style for i in own}),
        }
        print(animal, results[animal], file=sys.stderr, flush=True)
    return results


@torch.no_grad()
def ranking(folder: Path, pictures: Pictures) -> dict[str, float]:
    """How often `emoji_clip` ranks "a <animal>" first, or among the first five, for renders on named backgrounds."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    pooled = encode(clip, tokenizer, [prompt(animal) for animal in ANIMALS])[1]
    texts = F.normalize(clip.text_projection(pooled), dim=-1)
    generator = torch.Generator().manual_seed(12)
    rows = torch.tensor(pictures.animals(held_out=None)).repeat(4)
    colours = COLOURS[torch.randint(len(COLOURS), (len(rows),), generator=generator)]
    scores = torch.cat(
        [
            embed_images(clip, draw_images(pictures, r, c, generator)) @ texts.T
            for r, c in zip(rows.split(64), colours.split(64), strict=True)
        ]
    )
    animals, _ = labels(pictures)
    own = scores.gather(1, animals[rows].unsqueeze(1))
    rank = (scores > own).sum(1)
    held = torch.tensor([is_held_out(pictures.rows[i].subject, pictures.rows[i].style) for i in rows.tolist()])
    return {
        "seen_top1": (rank[~held] == 0).float().mean().item(),
        "held_out_top1": (rank[held] == 0).float().mean().item(),
        "held_out_top5": (rank[held] < 5).float().mean().item(),
        "held_out_pictures": int(held.sum()) // 4,
    }


def save_grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """Images (n, 3, 64, 64) as one PNG, row by row, twice their size."""
    n, _, h, w = images.shape
    table = images.view(n // columns, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(n // columns * h, columns * w, 3)
    picture = Image.fromarray((table.clamp(0, 1).numpy() * 255).round().astype(np.uint8))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--build-dir", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.75)
    parser.add_argument("--spacing", choices=["leading", "trailing"], default=None, help="default: the model's own")
    parser.add_argument("--images", type=int, default=8, help="per animal, for the accuracy; 0 leaves it out")
    parser.add_argument("--variety", type=int, default=0, help="images per animal for variety; 0 leaves it out")
    parser.add_argument("--ranking", action="store_true", help="also measure emoji_clip")
    parser.add_argument("--name", default="quality", help="name of the json and png files in the build directory")
    arguments = parser.parse_args()
    start = time.monotonic()
    pictures = Pictures.load(arguments.build_dir / "pictures.safetensors")
    judge = load_judge(arguments.build_dir / "judge.pt")
    result: dict[str, object] = {"steps": arguments.steps, "guidance": arguments.guidance}
    pipeline = load_pipeline(arguments.assets / "emoji", arguments.spacing)
    result["spacing"] = pipeline.scheduler.config.timestep_spacing
    rows = torch.tensor(pictures.animals())
    generator = torch.Generator().manual_seed(13)
    colours = COLOURS[torch.randint(len(COLOURS), (len(rows),), generator=generator)]
    renders = draw_images(pictures, rows, colours, generator)
    animals, _ = labels(pictures)
    result["judge_on_renders"] = accuracy(judge, renders, animals[rows].tolist())[0]
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(part * 2 - 1).sample.clamp(-1, 1) / 2 + 0.5 for part in renders.split(64)])
    result["judge_on_decoded_renders"] = accuracy(judge, decoded, animals[rows].tolist())[0]
    result["vae_l1"] = (decoded - renders).abs().mean().item()
    if arguments.images:
        prompts = [prompt(animal) for animal in ANIMALS for _ in range(arguments.images)]
        made = generate(pipeline, prompts, 0, arguments.steps, arguments.guidance)
        wanted = [i for i in range(len(ANIMALS)) for _ in range(arguments.images)]
        share, each = accuracy(judge, made, wanted)
        result["accuracy"] = share
        result["accuracy_of"] = dict(zip(ANIMALS, each, strict=True))
        if arguments.images >= 8:
            chosen = [list(ANIMALS).index(animal) * arguments.images + j for animal in GRID for j in range(8)]
            save_grid(made[chosen], 8, arguments.build_dir / f"{arguments.name}.png")
    if arguments.variety:
        perceptual = Perceptual(arguments.assets / "lpips" / "alexnet.safetensors")
        result["variety"] = variety(pipeline, judge, perceptual, pictures, arguments)
    if arguments.ranking:
        result["ranking"] = ranking(arguments.assets / "emoji_clip", pictures)
    result["seconds"] = time.monotonic() - start
    text = json.dumps(result, indent=2)
    (arguments.build_dir / f"{arguments.name}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
