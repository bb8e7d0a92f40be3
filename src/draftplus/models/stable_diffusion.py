"""Stable Diffusion 1.x and 2.x, and every model built like them, through diffusers and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftplus.config import ModelConfig, SamplerConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.levels import saved
from draftplus.distributed import Offload, sent
from draftplus.errors import UserError, needs_memory, notice
from draftplus.models import loading, quantize, single_file
from draftplus.models.bare import is_bare
from draftplus.models.compiling import compile_blocks
from draftplus.models.embeddings import Embeddings
from draftplus.models.kind import decodes_in_float32, spare_memory
from draftplus.models.paths import is_single_file
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.progress import Advance
from draftplus.types import Conditioning, Raw

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
NAME = "Stable Diffusion 1.x/2.x"


class StableDiffusion:
    """The `Model` of a UNet with one CLIP text encoder and a KL autoencoder."""

    def __init__(
        self, tuned: Tuned, vae: Any, text_encoder: Any, tokenizer: Any, scheduler_config: Mapping[str, Any],
        offload: Offload | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.tuned, self.vae, self.text_encoder, self.tokenizer = tuned, vae, text_encoder, tokenizer
        self.scheduler_config = scheduler_config
        self.device = device or next(tuned.denoiser.parameters()).device
        self.offload = offload or Offload(self.device, False)
        self.offload.use(vae, text_encoder)
        tuned.encoders = {"text_encoder": text_encoder}
        self.encode = Embeddings(self._embed, tuned.encoders_state)

    @property
    def unet(self) -> Any:
        return self.tuned.denoiser

    @property
    def decoder(self) -> Any:
        return self.vae.decoder

    @property
    def noise_dtype(self) -> torch.dtype:
        return self.text_encoder.dtype  # that of stock's prompt embeddings

    @property
    def image_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def _embed(self, prompt: str | None) -> Conditioning:
        from diffusers.loaders import TextualInversionLoaderMixin

        # a tokenizer whose files name no maximal length says 10^30
        longest = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        text = TextualInversionLoaderMixin().maybe_convert_prompt(prompt or "", self.tokenizer)
        self.encode.cut(len(self.tokenizer(text).input_ids), longest)
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        self.offload.use(self.text_encoder)
        with needs_memory("the text encoder"):
            return Conditioning(self.text_encoder(tokens.input_ids, attention_mask=mask)[0])  # (1, n, d)

    def prepare(self, prompts: Sequence[str | None], advance: Advance, share: tuple[int, int] = (0, 1)) -> None:
        """Nothing: the one small encoder stays, and embeds each prompt when it is needed."""

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample = self.unet.config.sample_size
        default = sample if isinstance(sample, Sequence) else (sample, sample)
        sides = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is None and latent is None:
                raise UserError(
                    f"sampler.{name} is null, and this model's unet/config.json has no sample_size; set sampler.height "
                    "and sampler.width"
                )
            if pixels is not None and pixels % factor:
                raise UserError(f"sampler.{name} is {pixels}; it must be a multiple of {factor} for this model")
            sides.append(latent if pixels is None else pixels // factor)
        return self.unet.config.in_channels, sides[0], sides[1]

    def check(self, sampler: SamplerConfig) -> None:
        pass

    def scheduler(self, shape: tuple[int, int, int], steps: int) -> Mapping[str, Any]:
        return self.scheduler_config

    def guided(self, given: Conditioning, negative: str | None, scale: float) -> Raw:
        if self.unet.config.time_cond_proj_dim is None:
            return classifier_free(self.predict, given, self.encode([negative]), scale)
        # a guidance-distilled UNet (latent consistency models, arXiv 2310.04378) is told the scale, in one pass
        told = replace(given, extras={"timestep_cond": self._scale_embedding(scale).expand(len(given), -1)})
        return lambda x, timestep: self.predict(x, timestep, told)

    def doubles(self, negative: str | None, scale: float) -> bool:
        return scale > 1 and self.unet.config.time_cond_proj_dim is None

    def _scale_embedding(self, scale: float) -> Tensor:
        from diffusers import StableDiffusionPipeline

        told = torch.tensor([scale - 1])
        width = self.unet.config.time_cond_proj_dim
        embedding: Tensor = StableDiffusionPipeline.get_guidance_scale_embedding(self, told, width)  # (1, width)
        return sent(embedding, self.device)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The raw prediction without guidance. latents: (b, c, h, w), timestep: () or (b,). Returns (b, c, h, w)."""
        unet, dtype = self.tuned.network, self.tuned.precision
        hidden, extras = conditioning.hidden.to(dtype), {k: v.to(dtype) for k, v in conditioning.extras.items()}
        raw: Tensor = unet(latents.to(dtype), timestep, encoder_hidden_states=hidden, **extras, return_dict=False)[0]
        return raw

    def decode(self, latents: Tensor) -> Tensor:
        self.offload.use(self.vae)
        config, dtype = self.vae.config, self.vae.dtype
        latents = latents.to(dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        with needs_memory(f"decoding {len(latents)} images"):
            image = self.vae.decode(latents, return_dict=False)[0]
        image = image + 0 * image  # an overflow becomes NaN, where clamp would make white or black of it
        return (image.to(torch.promote_types(torch.float32, dtype)) / 2 + 0.5).clamp(0, 1)

    def compile(self) -> None:
        compile_blocks(self.tuned.networks(), self.vae, self.device)

    def as_pipeline(self, scheduler: Any = None) -> Any:
        """Without a safety checker. The stock pipeline's constructor mends the configuration of the UNet."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def load(
    config: ModelConfig, path: str, device: torch.device, seed: int = 0, trainable: bool = True,
    dtype: torch.dtype | None = None, denoiser_on: torch.device | None = None,
) -> StableDiffusion:  # fmt: skip
    """Loads a model of the Stable Diffusion 1.x/2.x family, ready to be trained or, if not `trainable`, to be sampled.

    path: diffusers directory, hub id, or a single .safetensors/.ckpt file. dtype: of frozen weights, instead of the
    configuration's; trained weights, and the frozen copy of a fully tuned denoiser, are in at least float32.
    denoiser_on: where the denoiser is; None: on the device. On the meta device no weights are read.

    Raises UserError for a missing model, one of another family, or weights that would run code.
    """
    from diffusers import StableDiffusionPipeline

    frozen = dtype or getattr(torch, config.dtype)
    quantize.refuse_impossible(config, device, is_single_file(path))
    unet, vae, text_encoder, tokenizer, scheduler_config = _components(config, path, frozen, is_bare(device))
    _refuse_other_families(path, unet.config, vae.config, text_encoder.config)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(device if part is not unet else denoiser_on or device)
    if decodes_in_float32(vae):
        vae.to(torch.float32)
    tuned = make_tuned(unet, StableDiffusionPipeline, config.lora, seed, trainable, ATTENTION)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    spare_memory(vae, config)
    offload = Offload(device, config.offload)
    model = StableDiffusion(tuned, vae, text_encoder, tokenizer, _mended(path, scheduler_config), offload, device)
    with loading.loading("model.path", path, NAME):
        _repair(path, model)
    return model


def _refuse_other_families(path: str, unet: Any, vae: Any, text: Any) -> None:
    plain = unet.addition_embed_type in (None, "text") and unet.encoder_hid_dim_type is None
    plain = plain and unet.class_embed_type is None and unet.num_class_embeds is None
    if not plain or unet.in_channels != vae.latent_channels or unet.cross_attention_dim != text.hidden_size:
        raise UserError(f"model.path '{path}' is not a text-to-image model of the {NAME} family")


def _repair(path: str, model: StableDiffusion) -> None:
    """Mends a UNet's configuration of early versions of diffusers as stock does, which is where it makes a pipeline."""
    before = model.unet.config.sample_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its advice to edit the file, which we give in one line
        model.as_pipeline()
    config = model.unet.config
    if config.sample_size != before:
        notice(
            f"model.path '{path}': its unet/config.json, of diffusers {config._diffusers_version}, says "
            f"sample_size {before}; {config.sample_size} is used instead, as stock diffusers does"
        )


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


def _components(
    config: ModelConfig, path: str, dtype: torch.dtype, bare: bool
) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    networks = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    with loading.loading("model.path", path, NAME):
        if is_single_file(path):
            source = single_file.source(config, path, bare)
            tokenizer = single_file.tokenizer(source.directory)
        else:
            directory = loading.fetched(config, path)
            accepts = lambda parts: _refuse_other_families(path, *parts.values())  # noqa: E731
            source = loading.source(config, path, directory, networks, accepts, bare)
            tokenizer = CLIPTokenizer.from_pretrained(source.directory, subfolder="tokenizer")
        if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # transformers does not miss the files
            raise ValueError("its tokenizer has no vocabulary")
        unet, vae, text_encoder = (loading.load_part(cls, source, name, dtype) for name, cls in networks.items())
        scheduler_config = DDIMScheduler.load_config(source.directory, subfolder="scheduler")
    return unet, vae, text_encoder, tokenizer, scheduler_config
