"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025, arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.levels import linear
from draftplus.models.kind import Kind, Shape, multiples, shift_of, token_counts
from draftplus.models.pipeline import PipelineModel, load_pipeline
from draftplus.types import Conditioning, Raw

LONGEST = 512 - 3  # tokens that the stock pipeline reads of a prompt: all but those of its template before it


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """The last layer but one of a language model that is told to draw the prompt, without padding."""
    rows, _ = pipe.encode_prompt(prompt or "", device=pipe.text_encoder.device, do_classifier_free_guidance=False)
    return Conditioning(rows[0][None])


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The transformer takes lists, of images of one frame and of prompts without padding, and the time from noise to
    image; it predicts the velocity from the noise to the image, where schedules have the reverse."""
    frames = list(latents.unsqueeze(2).unbind())
    given: list[Tensor] = list(conditioning.hidden)
    if conditioning.mask is not None:
        given = [row[mask] for row, mask in zip(given, conditioning.mask, strict=True)]
    raw = network(frames, (1000 - timestep.expand(len(latents))) / 1000, given, return_dict=False)[0]
    return -torch.stack(raw).squeeze(2)


def doubles(pipe: Any, negative: str | None, scale: float) -> bool:
    return scale > 0


def guided(model: PipelineModel, given: Conditioning, negative: str | None, scale: float) -> Raw:
    """c + scale * (c - u), which is classifier-free guidance whose scale is one more; on from 0, not from 1."""
    return classifier_free(model.predict, given, model.encode([negative]) if scale > 0 else given, scale + 1)


def shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    sides = multiples(2 * pipe.vae_scale_factor, height or 1024, width or 1024)
    return pipe.transformer.config.in_channels, *(side // pipe.vae_scale_factor for side in sides)


def scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    return {**config, "mu": shift_of(pipe, (shape[1] // 2) * (shape[2] // 2)), "sigmas": linear(steps)}


def accepts(parts: Mapping[str, Any]) -> None:
    if parts["transformer"].in_channels != parts["vae"].latent_channels:
        raise ValueError("its transformer is not one of a text-to-image model of Z-Image")


KIND = Kind(
    label="Z-Image",
    pipeline="ZImagePipeline",
    networks={"transformer": ("ZImageTransformer2DModel",), "vae": ("AutoencoderKL",), "text_encoder": ("Qwen3Model",)},
    embed=embed, predict=predict, guided=guided, doubles=doubles, shape=shape, scheduler=scheduler, accepts=accepts,
    noise_dtype=lambda dtype: torch.float32, lengths=partial(token_counts, limits={"tokenizer": LONGEST}),
)  # fmt: skip
load = partial(load_pipeline, KIND)
