"""FLUX.1 (Black Forest Labs 2024), which is told its guidance scale, and its distilled model, which has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.diffusion.levels import linear
from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.models.kind import Kind, Shape, multiples, shift_of, token_counts
from draftplus.models.pipeline import PipelineModel, load_pipeline
from draftplus.types import Conditioning, Raw

SCALE = 3.5  # the stock pipeline's default
LONGEST = 512  # tokens, likewise
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """T5's tokens, and CLIP's pooled embedding."""
    hidden, pooled, _ = pipe.encode_prompt(prompt or "", None, device=pipe.text_encoder.device)
    return Conditioning(hidden, extras={"pooled_projections": pooled})


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """Patches of 2 x 2 latents are the tokens. The time is rounded to the network's precision before it is divided."""
    b, c, h, w = latents.shape
    places = pipe._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", latents.dtype)
    raw = network(
        hidden_states=pipe._pack_latents(latents, b, c, h, w), timestep=timestep.expand(b).to(latents.dtype) / 1000,
        encoder_hidden_states=conditioning.hidden, **conditioning.extras,
        txt_ids=latents.new_zeros(conditioning.hidden.shape[1], 3),
        img_ids=sent(places, latents.device), return_dict=False,
    )[0]  # fmt: skip
    factor = pipe.vae_scale_factor
    unpacked: Tensor = pipe._unpack_latents(raw, h * factor, w * factor, factor)
    return unpacked


def guided(model: PipelineModel, given: Conditioning, negative: str | None, scale: float) -> Raw:
    """In one pass: the network is told the scale, if it has an input for it."""
    if model.pipe.transformer.config.guidance_embeds:
        told = torch.full([len(given)], scale, dtype=torch.float32, device=given.hidden.device)
        given = replace(given, extras={**given.extras, "guidance": told})
    return lambda latents, timestep: model.predict(latents, timestep, given)


def shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    factor = pipe.vae_scale_factor
    default = pipe.default_sample_size * factor
    height, width = multiples(2 * factor, height or default, width or default)
    return pipe.transformer.config.in_channels // 4, height // factor, width // factor


def scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    return {**config, "mu": shift_of(pipe, (shape[1] // 2) * (shape[2] // 2)), "sigmas": linear(steps)}


def lengths(pipe: Any, prompt: str) -> dict[str, tuple[int, int]]:
    """T5's alone, which reads on where CLIP ends."""
    return {"tokenizer_2": token_counts(pipe, prompt, {"tokenizer_2": LONGEST})["tokenizer_2"]}


def accepts(parts: Mapping[str, Any]) -> None:
    if parts["transformer"].in_channels != 4 * parts["vae"].latent_channels:
        raise ValueError("its transformer is not one of a text-to-image model of FLUX.1")


def check(pipe: Any, sampler: SamplerConfig) -> None:
    if sampler.negative_prompt is not None:
        raise UserError(
            f"sampler.negative_prompt is '{sampler.negative_prompt}', but FLUX.1 is sampled without one; leave it null"
        )
    refuse_scale(sampler, SCALE, pipe.transformer.config.guidance_embeds)


def refuse_scale(sampler: SamplerConfig, default: float, has_guidance: bool) -> None:
    """UserError for a guidance scale that a distilled model, which has no guidance, would ignore."""
    scale = sampler.guidance_scale
    if not has_guidance and scale is not None and scale > 1 and scale != default:
        raise UserError(
            f"sampler.guidance_scale is {scale}, but this distilled model has no guidance, so it has no effect; "
            "leave it null"
        )


KIND = Kind(
    label="FLUX.1",
    pipeline="FluxPipeline",
    networks={
        "transformer": ("FluxTransformer2DModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
    },
    embed=embed, predict=predict, guided=guided, doubles=lambda *_: False, shape=shape, scheduler=scheduler,
    accepts=accepts, check=check, lengths=lengths,
    targets=(*(f"attn.{name}" for name in ATTENTION), *FEED_FORWARD),
)  # fmt: skip
load = partial(load_pipeline, KIND)
