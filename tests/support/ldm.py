"""A Stable Diffusion's weights under the names of the original latent diffusion code (arXiv 2112.10752)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def unet_as_ldm(state: dict[str, Tensor], layers: int = 1, levels: int = 2) -> dict[str, Tensor]:
    """A UNet's state. layers, levels: `layers_per_block`, and how many blocks go down."""
    blocks = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}  # fmt: skip
    for level in range(levels):
        for layer in range(layers):
            at = f"input_blocks.{1 + level * (layers + 1) + layer}"
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"{at}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            at = f"output_blocks.{level * (layers + 1) + layer}"
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"{at}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"{at}.1"
        after = 2 if any(name.startswith(f"up_blocks.{level}.attentions.") for name in state) else 1
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{level * (layers + 1) + layers}.{after}.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
              "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
    return _renamed(state, "model.diffusion_model.", blocks, inside)


def vae_as_ldm(state: dict[str, Tensor], levels: int = 2) -> dict[str, Tensor]:
    """An autoencoder's state; its attention was made of 1x1 convolutions."""
    blocks = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        blocks |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        blocks |= {f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1"}
        blocks |= {f"{half}.mid_block.resnets.{i}": f"{half}.mid.block_{i + 1}" for i in range(2)}
    for level in range(levels):
        for i in range(3):
            blocks[f"encoder.down_blocks.{level}.resnets.{i}"] = f"encoder.down.{level}.block.{i}"
            blocks[f"decoder.up_blocks.{level}.resnets.{i}"] = f"decoder.up.{levels - 1 - level}.block.{i}"
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    inside = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
              "to_out": "proj_out"}  # fmt: skip
    renamed = _renamed(state, "first_stage_model.", blocks, inside)
    linear = {name for name, tensor in renamed.items() if ".attn_1." in name and tensor.ndim == 2}
    return {
        name.replace("proj_out.0", "proj_out"): tensor[..., None, None] if name in linear else tensor
        for name, tensor in renamed.items()
    }


def text_as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's state as OpenCLIP has it, with one layer more, which Stable Diffusion 2.x leaves out."""
    prefix = "cond_stage_model.model."
    whole = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {prefix + theirs: bare[ours] for ours, theirs in whole.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in bare if name.startswith("encoder.layers."))
    for layer in range(layers + 1):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}.", f"{prefix}transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            renamed |= {f"{theirs}{new}.{end}": bare[f"{ours}{old}.{end}"] for old, new in inside.items()}
            qkv = [bare[f"{ours}self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"{theirs}attn.in_proj_{end}"] = torch.cat(qkv)
    width = bare["embeddings.token_embedding.weight"].shape[1]
    return renamed | {f"{prefix}text_projection": torch.zeros(width, width), f"{prefix}logit_scale": torch.zeros(())}


def as_single_file(directory: Path, version: int = 1) -> dict[str, Tensor]:
    """The weights of a saved tiny pipeline as one file of Stable Diffusion 1.x or 2.x holds them."""
    text = load_file(directory / "text_encoder/model.safetensors")
    prefix = "cond_stage_model.transformer.text_model."
    encoder = {prefix + name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    return {
        **unet_as_ldm(load_file(directory / "unet/diffusion_pytorch_model.safetensors")),
        **vae_as_ldm(load_file(directory / "vae/diffusion_pytorch_model.safetensors")),
        **(encoder if version == 1 else text_as_open_clip(text)),
    }


def _renamed(
    state: dict[str, Tensor], prefix: str, blocks: dict[str, str], inside: dict[str, str]
) -> dict[str, Tensor]:  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        block = max((b for b in blocks if name.startswith(f"{b}.")), key=len)
        part, dot, tail = name.removeprefix(f"{block}.").partition(".")
        if ".resnets." in name or prefix == "first_stage_model.":
            part = inside.get(part, part)
        renamed[f"{prefix}{blocks[block]}.{part}{dot}{tail}"] = tensor
    return renamed
