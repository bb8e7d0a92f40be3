"""FLUX.2 klein (Black Forest Labs 2026): the base models, with classifier-free guidance, and the distilled ones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.levels import linear
from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.models.flux import refuse_scale
from draftplus.models.kind import QKVO, Kind, Shape, multiples
from draftplus.models.pipeline import PipelineModel, load_pipeline
from draftplus.types import Conditioning, Raw

SCALE = 4.0  # the stock pipeline's default
LONGEST = 512  # tokens, likewise


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """Three layers of Qwen3 side by side, of the prompt in its chat template; padding is not left out."""
    hidden, _ = pipe.encode_prompt(prompt or "", device=pipe.text_encoder.device)
    return Conditioning(hidden)


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """Latents are of patches already. The time is rounded to the network's precision before it is divided."""
    raw: Tensor = network(
        hidden_states=pipe._pack_latents(latents), timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
        encoder_hidden_states=conditioning.hidden, guidance=None,
        txt_ids=sent(pipe._prepare_text_ids(conditioning.hidden), latents.device),
        img_ids=sent(pipe._prepare_latent_ids(latents), latents.device), return_dict=False,
    )[0]  # fmt: skip
    return raw.mT.reshape(latents.shape)


def doubles(pipe: Any, negative: str | None, scale: float) -> bool:
    return scale > 1 and not pipe.config.is_distilled


def guided(model: PipelineModel, given: Conditioning, negative: str | None, scale: float) -> Raw:
    """Away from the empty prompt; a distilled model has no guidance."""
    scale = 1.0 if model.pipe.config.is_distilled else scale
    return classifier_free(model.predict, given, model.encode([None]) if scale > 1 else given, scale)


def to_vae(pipe: Any, latents: Tensor) -> Tensor:
    """By the mean and deviation of each channel of a patch, and out of the patches."""
    norm, eps = pipe.vae.bn, pipe.vae.config.batch_norm_eps
    mean, std = (t.view(1, -1, 1, 1).to(latents) for t in (norm.running_mean, (norm.running_var + eps).sqrt()))
    unpatched: Tensor = pipe._unpatchify_latents(latents * std + mean)
    return unpatched


def shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    factor = 2 * pipe.vae_scale_factor
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = multiples(factor, height or default, width or default)
    return pipe.transformer.config.in_channels, height // factor, width // factor


def scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return {**config, "mu": compute_empirical_mu(shape[1] * shape[2], steps), "sigmas": linear(steps)}


def lengths(pipe: Any, prompt: str) -> dict[str, tuple[int, int]]:
    """With those of the chat template around it."""
    told = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = pipe.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **told)
    return {"tokenizer": (len(pipe.tokenizer(text).input_ids), LONGEST)}


def accepts(parts: Mapping[str, Any]) -> None:
    if parts["transformer"].in_channels != 4 * parts["vae"].latent_channels:
        raise ValueError("its transformer is not one of a text-to-image model of FLUX.2 klein")


def check(pipe: Any, sampler: SamplerConfig) -> None:
    if sampler.negative_prompt is not None:
        raise UserError(
            f"sampler.negative_prompt is '{sampler.negative_prompt}', but that of FLUX.2 klein is always empty; leave "
            "it null"
        )
    refuse_scale(sampler, SCALE, not pipe.config.is_distilled)


KIND = Kind(
    label="FLUX.2 klein",
    pipeline="Flux2KleinPipeline",
    networks={
        "transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
    },
    embed=embed, predict=predict, guided=guided, doubles=doubles, to_vae=to_vae, shape=shape, scheduler=scheduler,
    accepts=accepts, check=check, lengths=lengths, targets=(*QKVO, "to_qkv_mlp_proj", "attn.to_out"),
)  # fmt: skip
load = partial(load_pipeline, KIND)
