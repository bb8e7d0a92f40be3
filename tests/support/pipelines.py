"""Small random pipelines of the true classes of each family, configured as the published checkpoints are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.tiny import TOKENIZER

CLIP_WORDS = 1536
WIDTH = 32  # of every text encoder


def save_pipeline(name: str, directory: Path) -> Path:
    """Saves the tiny pipeline of that name in the diffusers layout, and returns the directory."""
    PIPELINES[name]().save_pretrained(directory)
    return directory


def stock(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of a directory; parts that its index holds as null are passed as None, as stock asks for."""
    from diffusers import DiffusionPipeline

    index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(directory, torch_dtype=dtype, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def lively(module: nn.Module, seed: int, gains: Mapping[str, float] | None = None) -> Any:
    """Draws every parameter anew, so that no input is multiplied by a zero or lost beside the others.

    Matrices keep the variance of what they are given, embeddings are of variance 1, scales of norms lie about 1.
    `gains` multiplies the parameters whose names match a pattern. Returns the module, in eval mode, without gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
        else:
            value = draw if id(parameter) in embeddings else draw / math.sqrt(parameter[0].numel())
        parameter.data = value * math.prod(gain for pattern, gain in (gains or {}).items() if re.search(pattern, name))
    return module.eval().requires_grad_(False)


def _clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77, pad_token=pad)


def _clip(seed: int, projection: bool, act: str = "quick_gelu") -> Any:
    """A text encoder of CLIP, with the projection of its pooled output or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=CLIP_WORDS, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=WIDTH, hidden_act=act,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as published: the pooled token is that of the highest id
    )  # fmt: skip
    return lively((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def _t5_tokenizer() -> Any:
    """Letters and the commonest pairs, as pieces of a Unigram model."""
    from transformers import T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-"
    pairs = "th he in er an re on at en nd st es ng or te ed ti hi as to".split()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(piece, -4.0) for piece in letters] + [(f"▁{piece}", -5.0) for piece in letters]
    pieces += [(pair, -5.0) for pair in pairs]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _t5(seed: int, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=256, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return lively(T5EncoderModel(config), seed)


def _vae(seed: int, latent_channels: int, **config: Any) -> Any:
    """An AutoencoderKL that makes an eighth of the size, as all of these do."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64,
        latent_channels=latent_channels, **config,
    )  # fmt: skip
    return lively(vae, seed, {"decoder.conv_out": 0.6})


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 4), use_linear_projection=True,
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
        timestep_spacing="leading", steps_offset=1, interpolation_type="linear", use_karras_sigmas=False,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(1, 4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(2, False), text_encoder_2=_clip(3, True, "gelu"),
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer("!"), unet=lively(unet, 4), scheduler=scheduler,
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def _sd3(t5: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    width = 2 * WIDTH  # T5's holds both of CLIP's
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=width, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=_vae(1, 16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(2, True), tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(3, True, "gelu"), tokenizer_2=_clip_tokenizer("!"),
        text_encoder_3=_t5(4, width) if t5 else None, tokenizer_3=_t5_tokenizer() if t5 else None,
        transformer=lively(transformer, 5), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd3_without_t5": partial(_sd3, t5=False),
}
