"""Transformers' weights under the names of their authors' code, as single files and other programs have them."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]
ENDS = ("weight", "bias")


def z_image(state: State) -> State:
    """With the norm that its authors' file has and no program uses."""
    names = {".attention.to_out.0.": ".attention.out.", ".norm_q.": ".q_norm.", ".norm_k.": ".k_norm.",
             "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder."}  # fmt: skip
    found = {"norm_final.weight": torch.ones(1)}
    for name, tensor in state.items():
        if name.endswith(".attention.to_q.weight"):
            block = name.removesuffix("to_q.weight")
            found[f"{block}qkv.weight"] = torch.cat([state[f"{block}to_{part}.weight"] for part in "qkv"])
        elif not name.endswith((".to_k.weight", ".to_v.weight")):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            found[name] = tensor
    return found


def flux2(state: State) -> State:
    whole = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
             "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
             "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
             "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
             "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
             "single_stream_modulation.linear": "single_stream_modulation.lin"}  # fmt: skip
    double = {"img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.linear_in",
              "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
              "txt_mlp.2": "ff_context.linear_out"}  # fmt: skip
    single = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
    return _blocks(state, whole, double, single, {})


def flux(state: State) -> State:
    """Of FLUX.1."""
    whole = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for i, layer in enumerate(("in_layer", "out_layer")):
            whole[f"time_text_embed.{ours}_embedder.linear_{i + 1}"] = f"{theirs}_in.{layer}"
    double = {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
              "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
              "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2"}  # fmt: skip
    single = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
    return _blocks(state, whole, double, single, {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")})


def _blocks(
    state: State, whole: dict[str, str], double: dict[str, str], single: dict[str, str],
    joined: dict[str, tuple[str, ...]],
) -> State:  # fmt: skip
    """whole: our name -> theirs; double, single: within a block, their name -> ours. joined: of a single block."""
    found = {}
    for end in ENDS:
        found |= {f"{new}.{end}": state[f"{old}.{end}"] for old, new in whole.items() if f"{old}.{end}" in state}
        if f"norm_out.linear.{end}" in state:  # its authors have the shift first
            scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
            found[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for side, parts, norm in (("img", ("to_q", "to_k", "to_v"), "norm_"),
                                  ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_")):  # fmt: skip
            found |= _joined(state, f"{theirs}.{side}_attn.qkv", [f"{ours}.attn.{part}" for part in parts])
            for long, short in (("query", "q"), ("key", "k")):
                found[f"{theirs}.{side}_attn.norm.{long}_norm.scale"] = state[f"{ours}.attn.{norm}{short}.weight"]
        for new, old in double.items():
            found |= _joined(state, f"{theirs}.{new}", [f"{ours}.{old}"])
    for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("single_transformer_blocks."))):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        for long, short in (("query", "q"), ("key", "k")):
            found[f"{theirs}.norm.{long}_norm.scale"] = state[f"{ours}.attn.norm_{short}.weight"]
        for new, parts in {**{new: (old,) for new, old in single.items()}, **joined}.items():
            found |= _joined(state, f"{theirs}.{new}", [f"{ours}.{part}" for part in parts])
    return found


def _joined(state: State, name: str, parts: list[str]) -> State:
    return {
        f"{name}.{end}": torch.cat([state[f"{part}.{end}"] for part in parts])
        for end in ENDS
        if f"{parts[0]}.{end}" in state
    }
