"""Chroma (lodestones 2025): FLUX.1 without CLIP, and with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.errors import UserError
from draftplus.models import flux
from draftplus.models.kind import Kind, Shape, token_counts
from draftplus.models.pipeline import load_pipeline
from draftplus.types import Conditioning


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """T5's tokens, with a mask of ones for them and one token of padding; to attention, which adds it, no more."""
    hidden, _, mask, *_ = pipe.encode_prompt(
        prompt or "", device=pipe.text_encoder.device, do_classifier_free_guidance=False
    )
    return Conditioning(hidden, extras={"attention_mask": mask})


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """As FLUX.1, with the mask of the prompt's tokens and, all of them there, the image's."""
    b, _, h, w = latents.shape
    given = conditioning.extras["attention_mask"]
    mask = pipe._prepare_attention_mask(b, (h // 2) * (w // 2), latents.dtype, given)
    masked = replace(conditioning, extras={"attention_mask": mask})
    with _masked_when_computed_anew(network, mask):
        return flux.predict(pipe, network, latents, timestep, masked)


@contextmanager
def _masked_when_computed_anew(network: Any, mask: Tensor) -> Iterator[None]:
    """Inside, gradient checkpointing gives single blocks the mask, which stock leaves out: another function then."""
    from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock

    stock = network._gradient_checkpointing_func

    def masked(block: Any, *given: Any) -> Any:
        return stock(block, *given, *([mask] if isinstance(block, ChromaSingleTransformerBlock) else []))

    network._gradient_checkpointing_func = masked
    try:
        yield
    finally:
        network._gradient_checkpointing_func = stock


def scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    """Sigmas by a beta distribution, which published models have, are the stock scheduler's own."""
    given = flux.scheduler(pipe, config, shape, steps)
    if not config.get("use_beta_sigmas"):
        return given
    pipe.scheduler.set_timesteps(sigmas=given["sigmas"], mu=given["mu"])
    final = {"sigmas": pipe.scheduler.sigmas[:-1].tolist(), "shift": 1.0, "shift_terminal": None}
    return {**given, **final, "use_beta_sigmas": False, "use_dynamic_shifting": False}


def check(pipe: Any, sampler: SamplerConfig) -> None:
    for key in ("sigmas", "spacing"):
        given = getattr(sampler, key)
        if given is not None and pipe.scheduler.config.use_beta_sigmas:
            raise UserError(
                f"sampler.{key} is {given}, but this model's scheduler_config.json has use_beta_sigmas: true, which "
                "replaces it; leave it null"
            )


def accepts(parts: Mapping[str, Any]) -> None:
    if parts["transformer"].in_channels != 4 * parts["vae"].latent_channels:
        raise ValueError("its transformer is not one of a text-to-image model of Chroma")


KIND = Kind(
    label="Chroma",
    pipeline="ChromaPipeline",
    networks={
        "transformer": ("ChromaTransformer2DModel",), "vae": ("AutoencoderKL",), "text_encoder": ("T5EncoderModel",),
    },
    embed=embed, predict=predict, shape=flux.shape, scheduler=scheduler, accepts=accepts, check=check,
    lengths=partial(token_counts, limits={"tokenizer": flux.LONGEST}),
    targets=tuple(f"attn.{name}" for name in flux.ATTENTION),
)  # fmt: skip
load = partial(load_pipeline, KIND)
