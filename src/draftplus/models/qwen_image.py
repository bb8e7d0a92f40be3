"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draftplus.config import SamplerConfig
from draftplus.distributed import constant
from draftplus.errors import UserError
from draftplus.models.flux import scheduler, shape
from draftplus.models.kind import Kind, token_counts
from draftplus.models.pipeline import PipelineModel, load_pipeline
from draftplus.types import Conditioning, Raw

LONGEST = 512  # tokens that the stock pipeline keeps of a prompt
SCALE = 4.0  # its guidance scale where none is given


def embed(pipe: Any, prompt: str | None) -> Conditioning:
    """The last layer of a vision-language model that is told to describe the image, without what it is told."""
    hidden, mask = pipe.encode_prompt(prompt or "", device=pipe.text_encoder.device, max_sequence_length=LONGEST)
    return Conditioning(hidden, mask)


def predict(pipe: Any, network: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The transformer takes patches of 2 x 2, and the time in [0, 1], rounded to its precision before it is divided."""
    height, width = latents.shape[2:]
    raw = network(
        hidden_states=pack(pipe, latents), timestep=timestep.expand(len(latents)).to(latents.dtype) / 1000,
        encoder_hidden_states=conditioning.hidden, encoder_hidden_states_mask=conditioning.mask,
        img_shapes=[[(1, height // 2, width // 2)]] * len(latents), return_dict=False,
    )[0]  # fmt: skip
    return unpack(pipe, raw, height, width)


def pack(pipe: Any, latents: Tensor) -> Tensor:
    """(b, c, h, w) to (b, h * w / 4, 4 * c)."""
    packed: Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def unpack(pipe: Any, packed: Tensor, height: int, width: int) -> Tensor:
    """`pack` undone. height, width: of latents."""
    latents: Tensor = pipe._unpack_latents(packed, height, width, 1)
    return latents.squeeze(2)


def doubles(pipe: Any, negative: str | None, scale: float) -> bool:
    return negative is not None and scale > 1


def guided(model: PipelineModel, given: Conditioning, negative: str | None, scale: float) -> Raw:
    """Classifier-free guidance, each patch as long as in the prediction for the prompt; none without a negative prompt.

    Two passes, as the prompts differ in length, and attention is faster without a mask.
    """
    if not doubles(model.pipe, negative, scale):
        return lambda x, timestep: model.predict(x, timestep, given)
    against = model.encode([negative] * len(given))

    def raw(x: Tensor, timestep: Tensor) -> Tensor:
        with_prompt, without = (pack(model.pipe, model.predict(x, timestep, c)) for c in (given, against))
        dtype = torch.promote_types(x.dtype, with_prompt.dtype)
        with_prompt, without = with_prompt.to(dtype), without.to(dtype)
        guided = without + scale * (with_prompt - without)
        guided = guided * (with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(model.pipe, guided, *x.shape[2:])

    return raw


def to_vae(pipe: Any, latents: Tensor) -> Tensor:
    """By the mean and deviation of each channel."""
    config = pipe.vae.config
    mean, std = (
        constant(tuple(v), torch.float32, latents.device).view(-1, 1, 1).to(latents)
        for v in (config.latents_mean, config.latents_std)
    )
    return latents / (1 / std) + mean  # in half precision not latents * std, which rounds otherwise


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """As `decode` of the autoencoder, one of videos, without its clamping, which would hide an overflow."""
    vae, frames = pipe.vae, latents.unsqueeze(2)
    if vae.use_slicing and len(latents) > 1:
        return torch.cat([decoded(pipe, one) for one in latents.split(1)])
    ratio = vae.spatial_compression_ratio
    height, width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    tiled = vae.use_tiling and (latents.shape[2] > height or latents.shape[3] > width)
    images: Tensor = vae.tiled_decode(frames).sample if tiled else vae.decoder(vae.post_quant_conv(frames))
    return images.squeeze(2)


def checkpoint_blocks(vae: Any) -> None:
    """By blocks of the decoder, which diffusers cannot."""
    for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
        block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Any, x: Tensor, *memory: Any) -> Tensor:
    # without the memory of frames before: there are none, and a second pass would find those of the first
    output: Tensor = checkpoint(forward, x, use_reentrant=False)
    return output


def accepts(parts: Mapping[str, Any]) -> None:
    transformer = parts["transformer"]
    if transformer.in_channels != 4 * parts["vae"].z_dim or transformer.use_additional_t_cond:
        raise ValueError("its transformer is not one of a text-to-image model of Qwen-Image")
    if transformer.guidance_embeds:
        raise ValueError("its transformer is told the guidance scale, which is not supported")


def check(pipe: Any, sampler: SamplerConfig) -> None:
    scale = sampler.guidance_scale
    if sampler.negative_prompt is None and scale is not None and scale > 1 and scale != SCALE:
        raise UserError(
            f"sampler.guidance_scale is {scale:g}, but without a negative prompt Qwen-Image has no guidance, so it has "
            "no effect; set sampler.negative_prompt=' ', or leave sampler.guidance_scale null"
        )


KIND = Kind(
    label="Qwen-Image",
    pipeline="QwenImagePipeline",
    networks={
        "transformer": ("QwenImageTransformer2DModel",), "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    },
    embed=embed, predict=predict, guided=guided, doubles=doubles, to_vae=to_vae, decoded=decoded, shape=shape,
    scheduler=scheduler, accepts=accepts, check=check, checkpoint=checkpoint_blocks,
    lengths=partial(token_counts, limits={"tokenizer": LONGEST}),
)  # fmt: skip
load = partial(load_pipeline, KIND)
