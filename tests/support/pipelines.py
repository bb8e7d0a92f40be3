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

from tests.tiny import TOKENIZER, tiny_pipeline

CLIP_WORDS = 1536
WIDTH = 32  # of most text encoders
SHARP = {r"norm_(added_)?[qk]": 2.0}  # attention that the many tokens of the template and of padding do not even out


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


def _flux(guidance_embeds: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    dev = {"shift": 3.0, "use_dynamic_shifting": True}
    schnell = {"shift": 1.0, "use_dynamic_shifting": False}
    return FluxPipeline(
        vae=_flux_vae(1), text_encoder=_clip(2, False), tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(3, WIDTH), tokenizer_2=_t5_tokenizer(), transformer=lively(transformer, 4),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
            **(dev if guidance_embeds else schnell),
        ),
    )  # fmt: skip


def _flux_vae(seed: int) -> Any:
    """Z-Image's too."""
    return _vae(seed, 16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def _chroma() -> Any:
    """With a plain schedule, which need not be the published one."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=2,
    )  # fmt: skip
    return ChromaPipeline(
        vae=_flux_vae(1), text_encoder=_t5(2, WIDTH), tokenizer=_t5_tokenizer(), transformer=lively(transformer, 3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip


def _flux2_klein(is_distilled: bool) -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3ForCausalLM

    width = 16
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * width, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=32, sample_size=64
    )
    lively(vae, 1, {"decoder.conv_out": 0.6})
    generator = torch.Generator().manual_seed(2)
    vae.bn.running_mean.copy_(0.5 * torch.randn(128, generator=generator))
    vae.bn.running_var.copy_(0.5 + 2 * torch.rand(128, generator=generator))
    return Flux2KleinPipeline(
        # stock reads the hidden states after 9, 18 and 27 layers
        vae=vae, text_encoder=_qwen3(Qwen3ForCausalLM, 3, width, layers=28), tokenizer=_qwen_tokenizer(CHAT_TEMPLATE),
        transformer=lively(transformer, 4, SHARP), is_distilled=is_distilled,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )  # fmt: skip


def _qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    encoder = Qwen2_5_VLConfig(
        text_config={
            **_qwen_widths(WIDTH), "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    return QwenImagePipeline(
        vae=lively(vae, 1, {"decoder.conv_out": 0.6}), tokenizer=_qwen_tokenizer(None),
        text_encoder=lively(Qwen2_5_VLForConditionalGeneration(encoder), 2),
        transformer=lively(transformer, 3, SHARP),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
        ),
    )  # fmt: skip


def _zimage(shift: float) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
    )  # fmt: skip
    return ZImagePipeline(
        vae=_flux_vae(1), text_encoder=_qwen3(Qwen3Model, 2, WIDTH, layers=3),
        tokenizer=_qwen_tokenizer(CHAT_TEMPLATE), transformer=lively(transformer, 3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
    )  # fmt: skip


def _qwen_widths(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 512, "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _qwen3(kind: Any, seed: int, width: int, layers: int) -> Any:
    from transformers import Qwen3Config

    return lively(kind(Qwen3Config(**_qwen_widths(width), head_dim=8, num_hidden_layers=layers)), seed)


# what Qwen3's own template does where there are no tools
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def _qwen_tokenizer(chat_template: str | None) -> Any:
    """One token for each byte, and for each word of the templates, so that these are as long as by the true one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AddedToken, Qwen2TokenizerFast

    words = "system user assistant Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext "
    words += "Ġspatial Ġrelationships Ġof Ġobjects Ġand Ġbackground ĊĊ"
    merges = dict.fromkeys((word[:i], word[i]) for word in words.split() for i in range(1, len(word)))
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", unk_token=None, model_max_length=131072, chat_template=chat_template,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    return tokenizer


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_pipeline,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sd3_without_t5": partial(_sd3, t5=False),
    "flux_dev": partial(_flux, guidance_embeds=True),
    "flux_schnell": partial(_flux, guidance_embeds=False),
    "chroma": _chroma,
    "flux2_klein_base": partial(_flux2_klein, is_distilled=False),
    "flux2_klein": partial(_flux2_klein, is_distilled=True),
    "qwen_image": _qwen_image,
    "zimage": partial(_zimage, shift=6.0),
    "zimage_turbo": partial(_zimage, shift=3.0),
}
