"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), with the T5 encoder and without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from draftplus.errors import UserError
from draftplus.models.kind import Kind, Shape, latent_shape, shift_of, token_counts
from draftplus.models.pipeline import load_pipeline
from draftplus.types import Conditioning

ADDED = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
OWN = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """CLIP's tokens and T5's after one another, zeros in place of the latter where it is absent; and CLIP's pooled."""
    text = prompt or ""
    hidden, _, pooled, _ = pipe.encode_prompt(
        text, text, text, device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )
    return Conditioning(hidden, extras={"pooled_projections": pooled})


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    raw: Tensor = network(
        hidden_states=latents, timestep=timestep.expand(len(latents)), encoder_hidden_states=conditioning.hidden,
        **conditioning.extras, return_dict=False,
    )[0]  # fmt: skip
    return raw


def shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    found = latent_shape(pipe, height, width)
    config = pipe.transformer.config
    most = config.pos_embed_max_size * config.patch_size  # beyond it the transformer has no position embeddings
    for key, side in (("height", found[1]), ("width", found[2])):
        if side > most:
            factor = pipe.vae_scale_factor
            raise UserError(
                f"sampler.{key} is {side * factor}; this model makes images of at most {most * factor} pixels"
            )
    return found


def scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    if not config.get("use_dynamic_shifting"):
        return config
    patch = pipe.transformer.config.patch_size
    return {**config, "mu": shift_of(pipe, (shape[1] // patch) * (shape[2] // patch))}


def accepts(parts: Mapping[str, Any]) -> None:
    if parts["transformer"].in_channels != parts["vae"].latent_channels:
        raise UserError("its transformer is not one of a text-to-image model of Stable Diffusion 3")


def lengths(pipe: Any, prompt: str) -> dict[str, tuple[int, int]]:
    """Where there is T5, its alone, which reads on where both CLIPs end."""
    counts = token_counts(pipe, prompt, {"tokenizer_3": 256})
    return {"tokenizer_3": counts["tokenizer_3"]} if "tokenizer_3" in counts else counts


KIND = Kind(
    label="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    networks={
        "transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",), "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    },
    embed=embed, predict=predict, shape=shape, scheduler=scheduler, accepts=accepts, targets=(*ADDED, *OWN),
    optional=("text_encoder_3",),
    lengths=lengths,
)  # fmt: skip
load = partial(load_pipeline, KIND)
