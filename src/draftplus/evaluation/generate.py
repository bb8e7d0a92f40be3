"""Images from a model, with stock seeds, so that a picture can be repeated in a stock pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from draftplus import rng
from draftplus.build import build_sampler
from draftplus.config import SamplerConfig
from draftplus.diffusion.annealing import annealed
from draftplus.diffusion.overflow import Watch, check_decoded
from draftplus.diffusion.sampler import sample
from draftplus.evaluation.chunks import SAMPLING_BATCH, chunks
from draftplus.evaluation.half_precision import rounded_latents, rounds
from draftplus.evaluation.knobs import TUNED, Job, Knobs
from draftplus.progress import Advance
from draftplus.types import Model


def generate_images(
    model: Model,
    jobs: Sequence[Job],
    sampler: SamplerConfig,
    batch_size: int = SAMPLING_BATCH,
    decode_batch_size: int | None = None,
    knobs: Knobs = TUNED,
    advance: Advance | None = None,
) -> Tensor:
    """The images of all jobs, (n, 3, H, W) in [0, 1] on the CPU.

    batch_size, decode_batch_size: images per pass of the denoiser, and of the decoder (None: the same).

    Raises UserError for knobs that are out of range or that these weights do not have.
    """
    images = []
    for rows, latents in sampled_latents(model, jobs, sampler, batch_size, knobs):
        images.append(decoded(model, latents, decode_batch_size or batch_size))
        if advance:
            advance(rows.stop, "")
    return torch.cat(images)


@torch.no_grad()
def decoded(model: Model, latents: Tensor, batch_size: int) -> Tensor:
    """The images (n, 3, H, W) float32 in [0, 1] of latents (n, c, h, w), on the CPU; rounded as stock draws them.

    Raises UserError where they are not finite.
    """
    parts = chunks(len(latents), batch_size)
    made = [model.decode(latents[rows].to(model.device)) for rows in parts]
    images = torch.cat([one.to(model.image_dtype).float().cpu() for one in made])
    check_decoded(images, model)
    return images


@torch.no_grad()
def sampled_latents(
    model: Model, jobs: Sequence[Job], config: SamplerConfig, batch_size: int, knobs: Knobs = TUNED
) -> Iterator[tuple[slice, Tensor]]:
    """The final latents (b, c, h, w) of the jobs, batch by batch, with the rows that they belong to.

    Raises UserError where they are not finite.
    """
    sampler = build_sampler(model, config)
    if knobs.anneal is not None:  # says which model draws each step
        sampler = replace(sampler, gate=0)
    shape = model.latent_shape(config.height, config.width)
    weights = knobs.weights(len(sampler.schedule))
    with _prepared(model, knobs, weights):
        for rows in chunks(len(jobs), batch_size):
            seeds = [job.seed for job in jobs[rows]]
            prompts = [job.prompt for job in jobs[rows]]
            given, watch = model.encode(prompts), Watch()
            noise = partial(_stock_noise, model, shape, seeds)
            blended = set(weights) not in ({0.0}, {1.0})
            if not blended and rounds(model, config):
                latents = rounded_latents(model, sampler, config, given, noise, watch)
            else:
                denoise = sampler.drawing(given)
                if blended:
                    with model.tuned.reference():  # an adapter of the text encoder changes the embeddings too
                        denoise = annealed(denoise, sampler.frozen(model.encode(prompts)), weights)
                start = sampler.start(noise(-1))
                model.offload.idle()
                latents = sample(watch.over(denoise), start, sampler.schedule, sampler.solver, noise=noise).latents
            watch.check(latents, len(sampler.schedule), model)
            yield rows, latents


@contextmanager
def _prepared(model: Model, knobs: Knobs, weights: Sequence[float]) -> Iterator[None]:
    """The model prepared for these weights, by the same computation whatever knob they come from.

    All 0 is the base model with its adapters off, all 1 the tuned one with its adapters folded: bit for bit what is
    made without any knob. A blend evaluates both models, so the adapters stay unfolded then.
    """
    if knobs.lora_scale != 1:
        model.tuned.set_scale(knobs.lora_scale)
    try:
        with _as_weighted(model, weights):
            yield
    finally:
        if knobs.lora_scale != 1:
            model.tuned.set_scale(1.0)


def _as_weighted(model: Model, weights: Sequence[float]) -> AbstractContextManager[None]:
    if not any(weights):
        return model.tuned.reference()
    return model.tuned.folded() if set(weights) == {1.0} else nullcontext()


def _stock_noise(model: Model, shape: tuple[int, int, int], seeds: Sequence[int], index: int) -> Tensor:
    # stock pipelines continue with each image's generator: the noise of step i is its draw number i + 1
    return rng.stock_noise(shape, seeds, model.noise_dtype, index + 1).to(model.device)
