"""Images from a model, with stock seeds, so that a picture can be repeated in a stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from draftplus import rng
from draftplus.config import SamplerConfig
from draftplus.diffusion.annealing import anneal_weights, annealed
from draftplus.diffusion.guidance import guided
from draftplus.diffusion.sampler import Rollout, sample
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver
from draftplus.engine.progress import Advance
from draftplus.engine.step import SAMPLING_BATCH, chunks
from draftplus.types import Model


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int


def jobs_of(prompts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every prompt with every seed, a prompt's images next to one another."""
    return [Job(prompt, seed) for prompt in prompts for seed in seeds]


@torch.no_grad()
def generate_images(
    model: Model,
    jobs: Sequence[Job],
    sampler: SamplerConfig,
    batch_size: int = SAMPLING_BATCH,
    decode_batch_size: int | None = None,
    anneal: str | None = None,
    advance: Advance | None = None,
) -> Tensor:
    """The images of all jobs, (n, 3, H, W) in [0, 1] on the CPU.

    batch_size, decode_batch_size: images per pass of the denoiser, and of the decoder (None: the same). anneal: a
    schedule of annealed importance guidance, such as `power:2`.
    """
    schedule, name = make_schedule(model.scheduler_config, sampler.steps, sampler.solver, sampler.spacing)
    solver = make_solver(name, sampler.eta)
    shape = model.latent_shape(sampler.height, sampler.width)
    weights = anneal_weights(anneal, len(schedule)) if anneal is not None else None
    unconditional = model.encode([sampler.negative_prompt])
    images = []

    def batch(rows: slice) -> Tensor:
        part = jobs[rows]
        seeds = [job.seed for job in part]
        conditioning = model.encode([job.prompt for job in part])
        denoise = guided(model, conditioning, unconditional, sampler.guidance_scale)
        if weights:
            denoise = annealed(denoise, model, schedule, weights)
        noise = partial(_solver_noise, shape, seeds, model.device)
        start = Rollout(rng.stock_noise(shape, seeds).to(model.device))
        latents = sample(denoise, start, schedule, solver, noise=noise).latents
        parts = chunks(len(latents), decode_batch_size or batch_size)
        return torch.cat([model.decode(latents[some]).float().cpu() for some in parts])

    # blending evaluates the base model too, so the adapters stay unfolded then
    with nullcontext() if weights else model.folded():
        for rows in chunks(len(jobs), batch_size):
            images.append(batch(rows))
            if advance:
                advance(rows.stop, "")
    return torch.cat(images)


def _solver_noise(shape: tuple[int, int, int], seeds: Sequence[int], device: torch.device, index: int) -> Tensor:
    # stock pipelines go on with each image's generator: noise of step i is its draw number i + 1
    draws = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        for _ in range(index + 2):
            draw = torch.randn(1, *shape, generator=generator)
        draws.append(draw)
    return torch.cat(draws).to(device)
