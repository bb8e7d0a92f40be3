"""What a family of models has of its own, as functions around its stock pipeline in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftplus.config import ModelConfig, SamplerConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.errors import UserError
from draftplus.types import Conditioning, Raw

Shape = tuple[int, int, int]
QKVO = ("to_q", "to_k", "to_v", "to_out.0")
DENOISERS = ("unet", "transformer")


def _classifier_free(model: Any, given: Conditioning, negative: str | None, scale: float) -> Raw:
    return classifier_free(model.predict, given, model.encode([negative]) if scale > 1 else given, scale)


def scaled(pipe: Any, latents: Tensor) -> Tensor:
    """Latents (b, c, h, w) as a KL autoencoder takes them, by the scale and shift of its configuration."""
    config = pipe.vae.config
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


def latent_shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    """(c, h, w) for pixels. None: the size that the denoiser was trained at."""
    default = pipe.default_sample_size * pipe.vae_scale_factor
    sides = multiples(pipe.vae_scale_factor * getattr(pipe, "patch_size", 1), height or default, width or default)
    return denoiser_of(pipe).config.in_channels, *(side // pipe.vae_scale_factor for side in sides)


def multiples(factor: int, height: int, width: int) -> tuple[int, int]:
    """The sides. Raises UserError unless both are multiples of `factor` pixels."""
    for key, pixels in (("height", height), ("width", width)):
        if pixels % factor:
            raise UserError(f"sampler.{key} is {pixels}; it must be a multiple of {factor} for this model")
    return height, width


def shift_of(pipe: Any, tokens: int) -> float:
    """mu, by which dynamic shifting follows the size of the image. tokens: of the denoiser."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
    names |= {"base_shift": "base_shift", "max_shift": "max_shift"}
    config = pipe.scheduler.config
    return float(calculate_shift(tokens, **{key: config[name] for key, name in names.items() if name in config}))


def token_counts(pipe: Any, prompt: str, limits: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """How many tokens a prompt has for each tokenizer of the pipeline, and how many are read.

    limits: of tokenizers whose own limit is not what the pipeline reads.
    """
    counts = {}
    for name in (name for name in pipe.config if name.startswith("tokenizer") and getattr(pipe, name) is not None):
        tokenizer = getattr(pipe, name)
        counts[name] = len(tokenizer(prompt).input_ids), (limits or {}).get(name, tokenizer.model_max_length)
    return counts


def _own_scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    return config


def _nothing_to_check(pipe: Any, sampler: SamplerConfig) -> None:
    pass


def _accept(config: Mapping[str, Any]) -> None:
    pass


def _checkpoint(vae: Any) -> None:
    vae.enable_gradient_checkpointing()


def spare_memory(vae: Any, config: ModelConfig, checkpoint: Callable[[Any], None] = _checkpoint) -> None:
    """Makes an autoencoder decode as the configuration asks for. Raises UserError where its class cannot."""
    for way in ("slicing", "tiling"):
        if getattr(config, f"vae_{way}"):
            if not hasattr(vae, f"use_{way}"):
                raise UserError(
                    f"model.vae_{way} is true, but {type(vae).__name__} of diffusers has no {way}; set "
                    f"model.vae_{way}=false"
                )
            getattr(vae, f"enable_{way}")()
    if config.gradient_checkpointing:
        checkpoint(vae)


def decodes_in_float32(vae: Any) -> bool:
    """Whether an autoencoder's configuration says that it overflows in float16, as stock pipelines ask of SDXL's.

    One that says nothing about it has the same setting, by default, and no meaning.
    """
    told = vae.config.get("force_upcast") and "force_upcast" not in vae.config.get("_use_default_values", ())
    return bool(told and vae.dtype == torch.float16)


@dataclass(frozen=True)
class Kind:
    """What a family has of its own. In what follows, `pipe` is its stock pipeline.

    label: its name for people. pipeline: the class in diffusers. networks: the classes that each of its folders may
    hold, the usual one first; optional: the folders that a model may lack. embed: (pipe, prompt) -> one row; None is
    the stock pipeline's negative prompt where none is given. predict: (pipe, network, latents (b, c, h, w), timestep,
    conditioning) -> the raw prediction, of that shape; all floating-point inputs in the network's precision. guided,
    doubles: as in `Model`, the latter of (pipe, negative prompt, scale). to_vae, decoded: latents as the autoencoder
    takes them, and its images (b, 3, H, W) in [-1, 1]. shape, scheduler, noise_dtype: as in `Model`, the last as the
    stock pipeline of a precision draws it. targets: the layers that LoRA calls "attention". accepts: (configuration by
    folder) raises an error for what the family does not support, before any weights are read. check: a UserError for
    settings of the sampler. lengths: (pipe, prompt) -> by tokenizer, the number of tokens and of those that are read.
    large_encoders: whether prompts are kept on disk, and encoders let go once all are embedded. checkpoint: makes the
    autoencoder compute what it decodes anew in the backward pass, by blocks.
    """

    label: str
    pipeline: str
    networks: Mapping[str, tuple[str, ...]]
    embed: Callable[[Any, str | None], Conditioning]
    predict: Callable[[Any, Any, Tensor, Tensor, Conditioning], Tensor]
    guided: Callable[[Any, Conditioning, str | None, float], Raw] = _classifier_free
    doubles: Callable[[Any, str | None, float], bool] = lambda pipe, negative, scale: scale > 1
    to_vae: Callable[[Any, Tensor], Tensor] = scaled
    decoded: Callable[[Any, Tensor], Tensor] = lambda pipe, z: pipe.vae.decode(z, return_dict=False)[0]
    shape: Callable[[Any, int | None, int | None], Shape] = latent_shape
    scheduler: Callable[[Any, Mapping[str, Any], Shape, int], Mapping[str, Any]] = _own_scheduler
    noise_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    targets: Sequence[str] = QKVO
    accepts: Callable[[Mapping[str, Any]], None] = _accept
    check: Callable[[Any, SamplerConfig], None] = _nothing_to_check
    lengths: Callable[[Any, str], Mapping[str, tuple[int, int]]] = token_counts
    optional: Sequence[str] = ()
    large_encoders: bool = True
    checkpoint: Callable[[Any], None] = _checkpoint

    @property
    def component(self) -> str:
        """The denoiser's name in the stock pipeline."""
        return next(name for name in self.networks if name in DENOISERS)


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a stock pipeline."""
    return getattr(pipe, next(name for name in DENOISERS if hasattr(pipe, name)))
