"""What stock DDIM loses with linspace spacing, where it steps to other noise levels than it tells the denoiser.

    python benchmarks/linspace.py --prompts 49 --seeds 4

The reward `emoji_clip` of pictures of the embedded model by the stock pipeline and by draftplus, of the same prompts
and noise in 10 steps, and the paired difference with its standard error over pictures.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import draftplus
from draftplus.data.prompts import read_prompts

STEPS, GUIDANCE = 10, 1.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=49)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    prompts, seeds = read_prompts("animals")[: options.prompts], list(range(options.seeds))
    pipeline = StableDiffusionPipeline.from_pretrained(str(files("draftplus") / "assets" / "emoji"))
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, steps_offset=1, timestep_spacing="linspace"
    )
    pipeline.set_progress_bar_config(disable=True)
    reward = draftplus.load_reward("emoji_clip")
    scores = []
    for name in ("draftplus", "diffusers"):
        made = []
        for prompt in prompts:
            if name == "draftplus":
                settings = ["sampler.spacing=linspace", f"sampler.steps={STEPS}", f"sampler.guidance_scale={GUIDANCE}"]
                images = draftplus.generate("emoji", [prompt], seeds, settings)
            else:
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
                told = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
                images = pipeline([prompt] * len(seeds), generator=generators, height=64, width=64, **told).images
            with torch.no_grad():
                made.append(reward(images.cpu().float(), [prompt] * len(seeds)).cpu())
        scores.append(torch.cat(made))
        print(f"{name}: {scores[-1].mean():.2f}")
    difference = scores[0] - scores[1]
    error = difference.std() / len(difference) ** 0.5
    print(f"difference {difference.mean():.2f} ± {error:.2f}, {len(difference)} pictures")


if __name__ == "__main__":
    main()
