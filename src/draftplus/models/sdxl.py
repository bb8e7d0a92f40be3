"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from draftplus.distributed import constant
from draftplus.errors import UserError
from draftplus.models.kind import Kind
from draftplus.models.pipeline import load_pipeline
from draftplus.types import Conditioning


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """Both encoders' last layer but one, side by side, and the pooled embedding of the second."""
    device = pipe.text_encoder_2.device
    hidden, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt or "", device=device, do_classifier_free_guidance=prompt is None
    )
    if prompt is None:
        hidden, pooled = negative, negative_pooled
    return Conditioning(hidden, extras={"text_embeds": pooled})


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The UNet is told the size of the image as that of the original and of the target, and no crop."""
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[2:])
    sizes = constant((height, width, 0, 0, height, width), latents.dtype, latents.device)
    added = {**conditioning.extras, "time_ids": sizes.expand(len(latents), -1)}
    raw: Tensor = network(
        latents, timestep, encoder_hidden_states=conditioning.hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    return raw


def to_vae(pipe: Any, latents: Tensor) -> Tensor:
    """By the scale of the autoencoder's configuration, or by its mean and deviation of each channel."""
    config = pipe.vae.config
    if config.latents_mean is None or config.latents_std is None:
        return latents / config.scaling_factor
    mean, std = (
        constant(tuple(v), torch.float32, latents.device).view(1, -1, 1, 1).to(latents)
        for v in (config.latents_mean, config.latents_std)
    )
    return latents * std / config.scaling_factor + mean


def accepts(parts: Mapping[str, Any]) -> None:
    unet = parts["unet"]
    first, second = parts["text_encoder"], parts["text_encoder_2"]
    plain = unet.addition_embed_type == "text_time" and unet.in_channels == parts["vae"].latent_channels
    if not plain or unet.cross_attention_dim != first.hidden_size + second.hidden_size:
        raise UserError("its UNet is not one of a text-to-image model of Stable Diffusion XL")
    if unet.time_cond_proj_dim is not None:
        raise UserError("its UNet is told the guidance scale (a latent consistency model), which is not supported")


KIND = Kind(
    label="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    networks={
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
    embed=embed, predict=predict, to_vae=to_vae, accepts=accepts, large_encoders=False,
)  # fmt: skip
load = partial(load_pipeline, KIND)
