"""Models and a reward of published sizes with random weights, made where they are used: nothing is downloaded.

The denoisers and autoencoders are configured as the published checkpoints are. Text encoders are left out: prompts
have random embeddings of the true shape.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from draftplus import rng
from draftplus.config import LoraConfig
from draftplus.models.embeddings import Embeddings
from draftplus.models.families import FAMILIES
from draftplus.models.pipeline import PipelineModel
from draftplus.models.single_file import CONFIGS, tokenizer
from draftplus.models.stable_diffusion import ATTENTION, StableDiffusion
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.rewards.clip import ClipReward
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from draftplus.types import Conditioning


@dataclass(frozen=True)
class Shape:
    """A model without its weights.

    pipeline: the stock pipeline's class. denoiser, vae, scheduler: class and configuration. tokens: of each prompt.
    """

    label: str
    pipeline: str
    denoiser: tuple[str, Mapping[str, Any]]
    vae: tuple[str, Mapping[str, Any]]
    scheduler: tuple[str, Mapping[str, Any]]
    tokens: int


def _packaged(part: str, file: str = "config.json") -> dict[str, Any]:
    """A part's configuration of Stable Diffusion 1.5, without the keys that name the class."""
    config = json.loads((CONFIGS / "sd1" / part / file).read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _vae(**config: Any) -> tuple[str, Mapping[str, Any]]:
    return "AutoencoderKL", {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, **config,
    }  # fmt: skip


def _vae_of_16_channels(scale: float, shift: float) -> tuple[str, Mapping[str, Any]]:
    convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    return _vae(latent_channels=16, scaling_factor=scale, shift_factor=shift, **convolutions)


SHAPES = {
    "sd15": Shape(
        "Stable Diffusion 1.5", "StableDiffusionPipeline", ("UNet2DConditionModel", _packaged("unet")),
        ("AutoencoderKL", _packaged("vae")), ("PNDMScheduler", _packaged("scheduler", "scheduler_config.json")), 77,
    ),
    "sdxl": Shape(
        "SDXL", "StableDiffusionXLPipeline",
        (
            "UNet2DConditionModel",
            {
                "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
                "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        _vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        (
            "EulerDiscreteScheduler",
            {
                "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                "timestep_spacing": "leading",
            },
        ),
        77,
    ),
    "sd35m": Shape(
        "SD3.5-medium", "StableDiffusion3Pipeline",
        (
            "SD3Transformer2DModel",
            {
                "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
                "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
                "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
                "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
            },
        ),
        _vae_of_16_channels(1.5305, 0.0609), ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), 333,
    ),
    "flux1": Shape(
        "FLUX.1-dev", "FluxPipeline",
        (
            "FluxTransformer2DModel",
            {
                "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
                "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                "guidance_embeds": True,
            },
        ),
        _vae_of_16_channels(0.3611, 0.1159),
        (
            "FlowMatchEulerDiscreteScheduler",
            {
                "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
                "base_image_seq_len": 256, "max_image_seq_len": 4096,
            },
        ),
        512,
    ),
}  # fmt: skip

# CLIP ViT-H/14, of which PickScore is a fine-tuned copy
CLIP_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip


@contextmanager
def making(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, networks are made on this device, in this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def made(part: tuple[str, Mapping[str, Any]], device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen network of a class of diffusers and a configuration, with the random weights that it starts from."""
    import diffusers

    with making(device, dtype):
        network = getattr(diffusers, part[0]).from_config(dict(part[1]))
    return network.to(dtype).requires_grad_(False).eval()


def component(shape: Shape) -> str:
    """The denoiser's name in the stock pipeline."""
    return "unet" if shape.denoiser[0].startswith("UNet") else "transformer"


def build(shape: Shape, lora: LoraConfig | None, device: torch.device, dtype: torch.dtype) -> Any:
    """The `Model` of a shape, as training loads it: tuned as `lora` says, with gradient checkpointing."""
    import diffusers

    stock = getattr(diffusers, shape.pipeline)
    network, vae = made(shape.denoiser, device, dtype), made(shape.vae, device, dtype)
    scheduler = getattr(diffusers, shape.scheduler[0]).from_config(shape.scheduler[1])
    settings = {"_class_name": shape.scheduler[0], **shape.scheduler[1]}

    def tuned(denoiser: Any, targets: Any) -> Tuned:
        denoiser.enable_gradient_checkpointing()
        return make_tuned(denoiser, stock, lora, 0, True, targets)

    vae.enable_gradient_checkpointing()
    model: Any
    if shape.pipeline == "StableDiffusionPipeline":
        model = StableDiffusion(tuned(network, ATTENTION), vae, nn.Identity(), None, settings)
    else:
        kind = importlib.import_module(FAMILIES[shape.pipeline].load.partition(":")[0]).KIND
        parts = {component(shape): network, "vae": vae, "scheduler": scheduler}
        needed = [p.name for p in inspect.signature(stock).parameters.values() if p.default is p.empty]
        pipe = stock(**{**dict.fromkeys(needed), **parts})
        model = PipelineModel(
            kind, pipe, [], parts.__getitem__, lambda denoiser: tuned(denoiser, kind.targets), settings, device, dtype
        )
    model.encode = Embeddings(lambda prompt: random_row(shape, prompt, device, dtype))
    return model


def random_row(shape: Shape, prompt: str | None, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """A prompt's embeddings, of the shape that the denoiser takes."""
    config = shape.denoiser[1]
    width = config.get("joint_attention_dim") or config["cross_attention_dim"]
    generator = torch.Generator().manual_seed(rng.address(0, f"prompt {prompt}"))

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(1, *sizes, generator=generator).to(device, dtype)

    extras = {}
    if config.get("addition_embed_type") == "text_time":  # SDXL's pooled embedding stands before the six sizes
        sizes = 6 * config["addition_time_embed_dim"]
        extras["text_embeds"] = drawn(config["projection_class_embeddings_input_dim"] - sizes)
    elif config.get("pooled_projection_dim"):
        extras["pooled_projections"] = drawn(config["pooled_projection_dim"])
    return Conditioning(drawn(shape.tokens, width), extras=extras)


def clip_h(device: torch.device, dtype: torch.dtype = torch.float32) -> ClipReward:
    """A reward of PickScore's shape, in the precision in which training holds it."""
    from transformers import CLIPConfig, CLIPModel

    with making(device, dtype):
        model = CLIPModel(CLIPConfig(**CLIP_H))
    model = model.to(dtype).requires_grad_(False).eval()
    preprocessing = Preprocessing(224, "bicubic", (224, 224), 1.0, CLIP_MEAN, CLIP_STD)
    return ClipReward(model, tokenizer(CONFIGS / "sd1"), preprocessing)
