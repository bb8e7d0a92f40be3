"""Stable Diffusion 1.x and 2.x, and every model built like them, through diffusers and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.config import ModelConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.levels import saved
from draftplus.errors import UserError, notice
from draftplus.models import loading
from draftplus.models.embeddings import Embeddings
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.models.weights import read_state_dict
from draftplus.types import Conditioning, Raw

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "Stable Diffusion 1.x/2.x"


class StableDiffusion:
    """The `Model` of a UNet with one CLIP text encoder and a KL autoencoder."""

    def __init__(
        self, tuned: Tuned, vae: Any, text_encoder: Any, tokenizer: Any, scheduler_config: Mapping[str, Any]
    ) -> None:
        self.tuned, self.vae, self.text_encoder, self.tokenizer = tuned, vae, text_encoder, tokenizer
        self.scheduler_config = scheduler_config
        self.device = next(tuned.denoiser.parameters()).device
        self.encode = Embeddings(self._embed)

    @property
    def unet(self) -> Any:
        return self.tuned.denoiser

    def _embed(self, prompt: str | None) -> Conditioning:
        tokens = self.tokenizer(
            [prompt or ""], padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return Conditioning(self.text_encoder(tokens.input_ids, attention_mask=mask)[0])  # (1, n, d)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample = self.unet.config.sample_size
        default = (sample, sample) if isinstance(sample, int) else sample
        sides = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is not None and pixels % factor:
                raise UserError(f"sampler.{name} is {pixels}; it must be a multiple of {factor} for this model")
            sides.append(latent if pixels is None else pixels // factor)
        return self.unet.config.in_channels, sides[0], sides[1]

    def scheduler(self, shape: tuple[int, int, int], steps: int) -> Mapping[str, Any]:
        return self.scheduler_config

    def guided(self, given: Conditioning, negative: Conditioning, scale: float) -> Raw:
        return classifier_free(self.predict, given, negative, scale)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The raw prediction without guidance. latents: (b, c, h, w), timestep: () or (b,). Returns (b, c, h, w)."""
        unet = self.tuned.network
        dtype = unet.conv_in.weight.dtype
        hidden = conditioning.hidden.to(dtype)
        raw: Tensor = unet(latents.to(dtype), timestep, encoder_hidden_states=hidden, return_dict=False)[0]
        return raw

    def decode(self, latents: Tensor) -> Tensor:
        config, dtype = self.vae.config, self.vae.post_quant_conv.weight.dtype
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        image = self.vae.decode(latents.to(dtype), return_dict=False)[0]
        return (image.to(torch.promote_types(torch.float32, dtype)) / 2 + 0.5).clamp(0, 1)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]


def load(
    config: ModelConfig, path: str, device: torch.device, seed: int = 0, trainable: bool = True,
    dtype: torch.dtype | None = None,
) -> StableDiffusion:  # fmt: skip
    """Loads a model of the Stable Diffusion 1.x/2.x family, ready to be trained or, if not `trainable`, to be sampled.

    path: diffusers directory, hub id, or a single .safetensors/.ckpt file. dtype: of frozen weights, instead of the
    configuration's; trained weights, and the frozen copy of a fully tuned denoiser, are in at least float32.

    Raises UserError for a missing model, one of another family, or weights that would run code.
    """
    frozen = dtype or getattr(torch, config.dtype)
    unet, vae, text_encoder, tokenizer, scheduler_config = _components(config, path, frozen)
    _refuse_other_families(path, unet.config, vae.config, text_encoder.config)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(device)
    tuned = make_tuned(unet, "unet", config.lora, seed, trainable, ATTENTION)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    return StableDiffusion(tuned, vae, text_encoder, tokenizer, _mended(path, scheduler_config))


def _refuse_other_families(path: str, unet: Any, vae: Any, text: Any) -> None:
    plain = unet.addition_embed_type in (None, "text") and unet.encoder_hid_dim_type is None
    if not plain or unet.in_channels != vae.latent_channels or unet.cross_attention_dim != text.hidden_size:
        raise UserError(f"model.path '{path}' is not a text-to-image model of the {NAME} family")


def _mended(path: str, scheduler_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A scheduler's configuration as the constructor of the stock pipeline mends it, for latent models of this family.

    `from_config` of another scheduler class forgets the mend, where the file has no such key.
    """
    given = saved(scheduler_config)
    mended = {**given, "steps_offset": 1, "clip_sample": False}
    was = {"steps_offset": given.get("steps_offset", 0), "clip_sample": bool(given.get("clip_sample", False))}
    changed = [f"{key} {str(was[key]).lower()} as {str(mended[key]).lower()}" for key in was if was[key] != mended[key]]
    if changed:
        notice(f"model.path '{path}': its scheduler_config.json is read as stock diffusers does, {', '.join(changed)}")
    return mended


def _components(config: ModelConfig, path: str, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    if loading.is_single_file(path):
        for key in ("denoiser", "vae", "revision"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"model.{key} cannot be combined with a single-file model.path, '{path}'; convert the file to a "
                    "diffusers directory"
                )
        return _single_file(str(Path(path).expanduser()), dtype)
    path = loading.source(path)
    hub: dict[str, Any] = {"revision": config.revision}
    with loading.loading("model.path", path, NAME):
        torch_dtype = {"torch_dtype": dtype}
        unet = loading.load_part(
            UNet2DConditionModel, path, "unet", torch_dtype, hub, config.denoiser, "model.denoiser"
        )
        vae = loading.load_part(AutoencoderKL, path, "vae", torch_dtype, hub, config.vae, "model.vae")
        text_encoder = loading.load_part(CLIPTextModel, path, "text_encoder", {"dtype": dtype}, hub)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **hub)
        if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # transformers does not miss the files
            raise ValueError("its tokenizer has no vocabulary")
        scheduler_config = DDIMScheduler.load_config(path, subfolder="scheduler", **hub)
    return unet, vae, text_encoder, tokenizer, scheduler_config


def _single_file(path: str, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    from diffusers import StableDiffusionPipeline

    if not Path(path).is_file():
        raise UserError(f"model.path '{path}': no such file")
    read_state_dict(Path(path))  # refuses a pickle that needs code before any other loader sees it
    with loading.loading("model.path", path, NAME):
        pipe = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, safety_checker=None)
    return pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler.config
