"""The tensors of a CLIP in NeMo's layouts as those of transformers' `CLIPModel`.

Names, shapes and what they compute are NeMo's up to 2.1 (megatron_clip_models.py, vit_backbone.py, attention.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from draftplus.errors import UserError

# NeMo's modules -> transformers', in the layout of Megatron's old transformer (the one that NeMo-Aligner's rewards
# have), and in that of Megatron core
TOWERS = {
    "vision_encoder.backbone.transformer.layers": "vision_model.encoder.layers",
    "vision_encoder.backbone.transformer.final_layernorm": "vision_model.post_layernorm",
    "vision_encoder.backbone.preprocess_layernorm": "vision_model.pre_layrnorm",
    "vision_encoder.backbone.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_encoder.backbone.cls_token": "vision_model.embeddings.class_embedding",
    "vision_encoder.backbone.conv1": "vision_model.embeddings.patch_embedding",
    "text_encoder.language_model.encoder.layers": "text_model.encoder.layers",
    "text_encoder.language_model.encoder.final_layernorm": "text_model.final_layer_norm",
    "text_encoder.language_model.embedding.word_embeddings": "text_model.embeddings.token_embedding",
    "text_encoder.language_model.embedding.position_embeddings": "text_model.embeddings.position_embedding",
    "vision_encoder.decoder.layers": "vision_model.encoder.layers",
    "vision_encoder.final_layernorm": "vision_model.post_layernorm",
    "vision_encoder.ln_pre": "vision_model.pre_layrnorm",
    "vision_encoder.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_encoder.class_token": "vision_model.embeddings.class_embedding",
    "vision_encoder.conv1": "vision_model.embeddings.patch_embedding",
    "text_encoder.decoder.layers": "text_model.encoder.layers",
    "text_encoder.final_layernorm": "text_model.final_layer_norm",
    "text_encoder.embedding.word_embeddings": "text_model.embeddings.token_embedding",
    "text_encoder.embedding.position_embeddings": "text_model.embeddings.position_embedding",
    "vision_encoder.head": "visual_projection",
    "text_encoder.head": "text_projection",
}
LAYER = {
    "input_layernorm.": "layer_norm1.",
    "self_attention.linear_qkv.layer_norm_": "layer_norm1.",
    "post_attention_layernorm.": "layer_norm2.",
    "pre_mlp_layernorm.": "layer_norm2.",
    "mlp.linear_fc1.layer_norm_": "layer_norm2.",
    "self_attention.dense.": "self_attn.out_proj.",
    "self_attention.linear_proj.": "self_attn.out_proj.",
    "mlp.dense_h_to_4h.": "mlp.fc1.",
    "mlp.linear_fc1.": "mlp.fc1.",
    "mlp.dense_4h_to_h.": "mlp.fc2.",
    "mlp.linear_fc2.": "mlp.fc2.",
    "self_attention.query_key_value.": "qkv.",  # which `_split` takes apart
    "self_attention.linear_qkv.": "qkv.",
}
# what tensor parallelism divides among its processes, by dimension; all else is the same in each
DIVIDED = (
    (re.compile(r"(token_embedding\.weight|(q_proj|k_proj|v_proj|fc1)\.(weight|bias))$"), 0),
    (re.compile(r"(out_proj|fc2)\.weight$"), 1),
)


def as_clip_model(
    ranks: Sequence[Mapping[str, Tensor]], config: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, Tensor]:  # fmt: skip
    """The whole under transformers' names; what has none keeps its own.

    ranks: what each tensor-parallel process holds. config: the settings of the towers "vision" and "text". where: the
    file, for the UserError where heads and tensors do not agree.
    """
    return _merged([_renamed(rank, config, len(ranks), where) for rank in ranks])


def _renamed(state: Mapping[str, Tensor], config: Mapping[str, Any], size: int, where: str) -> dict[str, Tensor]:
    """A tensor-parallel process's part under transformers' names; what has none keeps its own. size: their number."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name.removeprefix("model.").removeprefix("module.")  # the second where the whole was in half precision
        if ours.endswith("._extra_state"):  # Transformer Engine's scales for FP8
            continue
        module = next((module for module in TOWERS if ours.startswith(module)), None)
        if module is not None:
            ours = TOWERS[module] + ours.removeprefix(module)
        if ".layers." in ours:
            layer, _, rest = ours.partition(".layers.")[2].partition(".")
            part = next((part for part in LAYER if rest.startswith(part)), "")
            ours = f"{ours.partition('.layers.')[0]}.layers.{layer}.{LAYER.get(part, part)}{rest.removeprefix(part)}"
        if ".qkv." in ours:
            tower = config["vision" if ours.startswith("vision") else "text"]
            by_head = "linear_qkv" in name or not tower.get("megatron_legacy", False)
            for letter, own in zip("qkv", _split(name, tensor, tower, size, by_head, where), strict=True):
                found[ours.replace(".qkv.", f".self_attn.{letter}_proj.")] = own
        elif ours.endswith("class_embedding"):
            found[ours] = tensor.reshape(tensor.shape[-1:]) if tensor.numel() == tensor.shape[-1] else tensor
        else:  # one layout of position embeddings is a parameter without a module
            found[ours + ".weight" * ours.endswith("position_embedding")] = tensor
    return found


def _split(
    name: str, tensor: Tensor, tower: Mapping[str, Any], size: int, by_head: bool, where: str
) -> tuple[Tensor, ...]:  # fmt: skip
    """Query, key and value out of (3 * heads * width, ...): for each head all three, or for each of them all heads."""
    heads = tower["num_attention_heads"] // size
    if heads == 0 or len(tensor) % (3 * heads):
        raise UserError(f"'{where}': {name} is {tuple(tensor.shape)}, which is not 3 times {heads} heads")
    if not by_head:
        return tensor.chunk(3)
    return tuple(part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, -1)).unbind(1))


def _merged(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in ranks[0].items():
        dim = next((dim for pattern, dim in DIVIDED if pattern.search(name)), None)
        parts = [rank[name] for rank in ranks if name in rank]
        whole[name] = tensor if dim is None or len(ranks) == 1 else torch.cat(parts, dim)
    return whole
