"""HPSv2 and v2.1: a fine-tuned CLIP ViT-H/14, published with the names that open_clip gives its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.errors import UserError
from draftplus.rewards.captions import tokenizer_beside
from draftplus.rewards.checkpoints import fit, load_weights_file, refuse_nemo
from draftplus.rewards.clip import CLIP_H, ClipReward, load_tokenizer
from draftplus.rewards.dropout import check_rate
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from draftplus.types import Reward

HPSV2 = "xswu/HPSv2"
FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2": "HPS_v2_compressed.pt"}
VIT_H = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "bos_token_id": 49406, "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip

# open_clip's names -> those of transformers' CLIPModel; whole, or up to a dot
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
}
_IN_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def of_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named as in open_clip's CLIP, by the names of transformers' CLIPModel; other names stay as they are."""
    found = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        within = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}." if block else ""
        own = block[3] if block else name
        if block and own in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{within}self_attn.{part}_proj.{own.removeprefix('attn.in_proj_')}"] = rows
        elif name in ("text_projection", "visual.proj"):
            found[_NAMES[name]] = tensor.T  # (width, d) as it is multiplied from the right
        else:
            table = _IN_BLOCK if block else _NAMES
            known = next((one for one in table if own == one or (one.endswith(".") and own.startswith(one))), None)
            found[name if known is None else within + table[known] + own.removeprefix(known)] = tensor
    return found


def load_hpsv2(
    path: str | Path = HPSV2,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    version: str = "v2.1",
    processor: str | None = None,
    revision: str | None = None,
    dropout: float = 0.0,
    negative: str | None = None,
) -> Reward:
    """HPSv2 (Wu et al. 2023), the cosine, about 0.2-0.35; papers show it times 100.

    path: a hub id or a directory that has the file of `version` ("v2.1", "v2"), or the file itself. processor: the
    directory or hub id of the tokenizer; None: where the weights are, if it is there, else that of the network that
    they were tuned from. dropout: in [0, 1). negative: a contrasting text, see `ClipReward`.

    The published package scores under float16 autocast, and resizes with or without antialiasing depending on
    torchvision (with, since 0.17). This is float32, with antialiasing.
    """
    from transformers import CLIPConfig, CLIPModel

    check_rate("hpsv2", dropout)
    if version not in FILES:
        raise UserError(f"reward 'hpsv2': args.version is {version!r}; it must be {' or '.join(FILES)}.")
    refuse_nemo(path)
    tokenizer = load_tokenizer(str(processor or tokenizer_beside(path) or CLIP_H), None)
    tensors = of_transformers(load_weights_file(path, FILES[version], revision, "hpsv2"))
    config: Any = CLIPConfig(**VIT_H)
    model = fit(lambda: CLIPModel(config), tensors, f"reward.hpsv2.path '{path}'", dtype).to(device)
    size = config.vision_config.image_size
    preprocessing = Preprocessing(None, "bicubic", None, 1.0, CLIP_MEAN, CLIP_STD, longest=size)
    return ClipReward(model, tokenizer, preprocessing, "cosine", dropout, negative)
