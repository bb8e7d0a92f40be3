"""A Stable Diffusion's weights under the names of the original latent diffusion code (arXiv 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def unet_as_ldm(state: dict[str, Tensor], layers: int = 1, levels: int = 2) -> dict[str, Tensor]:
    """A UNet's state. layers, levels: `layers_per_block`, and how many blocks go down."""
    blocks = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
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


def text_as_open_clip(state: dict[str, Tensor], prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    """A text encoder's state as OpenCLIP has it; Stable Diffusion 2.x's has one layer more, which is left out."""
    whole = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {prefix + theirs: bare[ours] for ours, theirs in whole.items()}
    projection = bare.get("text_projection.weight")
    layers = 1 + max(int(name.split(".")[2]) for name in bare if name.startswith("encoder.layers."))
    for layer in range(layers + (projection is None)):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}.", f"{prefix}transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            renamed |= {f"{theirs}{new}.{end}": bare[f"{ours}{old}.{end}"] for old, new in inside.items()}
            qkv = [bare[f"{ours}self_attn.{part}_proj.{end}"] for part in "qkv"]
            renamed[f"{theirs}attn.in_proj_{end}"] = torch.cat(qkv)
    width = bare["embeddings.token_embedding.weight"].shape[1]
    projection = torch.zeros(width, width) if projection is None else projection.T.contiguous()
    return renamed | {f"{prefix}text_projection": projection, f"{prefix}logit_scale": torch.zeros(())}


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


def as_sdxl_file(pipe: Any, levels: int = 3, layers: int = 1) -> dict[str, Tensor]:
    """The weights of a stock SDXL pipeline as one file of the original layout holds them.

    levels, layers: of its UNet. The second text encoder is told from the first by its width.
    """
    first = {name.removeprefix("text_model."): tensor for name, tensor in pipe.text_encoder.state_dict().items()}
    return {
        **unet_as_ldm(pipe.unet.state_dict(), layers, levels),
        **vae_as_ldm(pipe.vae.state_dict(), 4),
        **{f"conditioner.embedders.0.transformer.text_model.{name}": tensor for name, tensor in first.items()},
        **text_as_open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model."),
    }


def sd3_as_original(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A transformer of Stable Diffusion 3 as its authors' code names it."""

    def swapped(tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1])

    def joined(block: str, *parts: str) -> dict[str, Tensor]:
        return {end: torch.cat([state[f"{block}.{part}.{end}"] for part in parts]) for end in ("weight", "bias")}

    whole = {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    for name, other in (("timestep", "t"), ("text", "y")):
        whole |= {f"time_text_embed.{name}_embedder.linear_{i + 1}": f"{other}_embedder.mlp.{2 * i}" for i in range(2)}
    found = {"pos_embed": state["pos_embed.pos_embed"]}
    for end in ("weight", "bias"):
        found |= {f"{theirs}.{end}": state[f"{ours}.{end}"] for ours, theirs in whole.items()}
        found[f"final_layer.adaLN_modulation.1.{end}"] = swapped(state[f"norm_out.linear.{end}"])
    for i in range(layers):
        ours, last = f"transformer_blocks.{i}", i == layers - 1
        x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        blocks = {f"{x}.attn.qkv": joined(f"{ours}.attn", "to_q", "to_k", "to_v"),
                  f"{context}.attn.qkv": joined(f"{ours}.attn", "add_q_proj", "add_k_proj", "add_v_proj")}  # fmt: skip
        names = {"attn.to_out.0": f"{x}.attn.proj", "norm1.linear": f"{x}.adaLN_modulation.1",
                 "ff.net.0.proj": f"{x}.mlp.fc1", "ff.net.2": f"{x}.mlp.fc2",
                 "norm1_context.linear": f"{context}.adaLN_modulation.1"}  # fmt: skip
        if not last:
            names |= {"attn.to_add_out": f"{context}.attn.proj", "ff_context.net.0.proj": f"{context}.mlp.fc1",
                      "ff_context.net.2": f"{context}.mlp.fc2"}  # fmt: skip
        norms = {"attn.norm_q": f"{x}.attn.ln_q", "attn.norm_k": f"{x}.attn.ln_k",
                 "attn.norm_added_q": f"{context}.attn.ln_q", "attn.norm_added_k": f"{context}.attn.ln_k"}  # fmt: skip
        if f"{ours}.attn2.to_q.weight" in state:
            blocks[f"{x}.attn2.qkv"] = joined(f"{ours}.attn2", "to_q", "to_k", "to_v")
            names["attn2.to_out.0"] = f"{x}.attn2.proj"
            norms |= {"attn2.norm_q": f"{x}.attn2.ln_q", "attn2.norm_k": f"{x}.attn2.ln_k"}
        for theirs, tensors in blocks.items():
            found |= {f"{theirs}.{end}": tensor for end, tensor in tensors.items()}
        for end in ("weight", "bias"):
            found |= {f"{theirs}.{end}": state[f"{ours}.{name}.{end}"] for name, theirs in names.items()}
        found |= {f"{theirs}.weight": state[f"{ours}.{name}.weight"] for name, theirs in norms.items()}
        if last:
            for end in ("weight", "bias"):
                found[f"{context}.adaLN_modulation.1.{end}"] = swapped(found[f"{context}.adaLN_modulation.1.{end}"])
    return found


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
