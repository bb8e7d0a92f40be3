"""Files of NeMo with random weights, and what its reward computes from them, written from Megatron's own layout.

The layouts: "legacy", of Megatron's old transformer with query, key and value one after the other for all heads
(`megatron_legacy`), as NeMo-Aligner's rewards have it; "by head", the same with all three of each head together; and
"core", of Megatron core, where norms are a part of the linear layer behind them.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

VISION = {"hidden_size": 16, "num_layers": 2, "ffn_hidden_size": 24, "num_attention_heads": 4}
TEXT = {"hidden_size": 8, "num_layers": 2, "ffn_hidden_size": 12, "num_attention_heads": 2}
SIZE, PATCH, WIDTH, LENGTH = 16, 8, 6, 10


def clip_config(layout: str = "legacy", activation: str = "gelu", **changes: Any) -> dict[str, Any]:
    """A `model_config.yaml` of a reward, with the keys of NeMo-Aligner's own that matter, and some that do not."""
    both = {
        "output_dim": "${model.output_dim}", "position_embedding_type": "learned_parameters", "kv_channels": None,
        "apply_query_key_layer_scaling": True, "normalization": "layernorm", "layernorm_epsilon": 1e-5,
        "openai_gelu": False, "megatron_legacy": layout == "legacy", "activation": activation, "hidden_dropout": 0.0,
    }  # fmt: skip
    own = {"patch_dim": PATCH, "img_h": SIZE, "img_w": SIZE, "num_channels": 3, "global_average_pool": False,
           "class_token_length": 1, "preprocess_layernorm": True, "image_mean": None}  # fmt: skip
    return {
        "target": "nemo_aligner.models.mm.stable_diffusion.image_text_rms.MegatronCLIPRewardModel",
        "output_dim": WIDTH, "tensor_model_parallel_size": 1, "mcore_gpt": layout == "core",
        "vision": {**both, **VISION, **own}, "text": {**both, **TEXT, "max_position_embeddings": LENGTH},
        "tokenizer": {"library": "huggingface", "type": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}, **changes,
    }  # fmt: skip


def clip_weights(layout: str = "legacy", vocabulary: int = 1536) -> dict[str, Tensor]:
    """A reward's state dict, in the names and shapes of NeMo 2.1."""
    draw = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * (0.5 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)

    def linear(rows: int, columns: int) -> dict[str, Tensor]:
        return {"weight": normal(rows, columns), "bias": normal(rows)}

    def norm(width: int) -> dict[str, Tensor]:
        return {"weight": 1 + normal(width), "bias": normal(width)}

    core = layout == "core"
    state: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    vision = "vision_encoder" if core else "vision_encoder.backbone"
    text = "text_encoder" if core else "text_encoder.language_model"
    embedding = ".weight" if core else ""  # "learned_absolute" and "learned_parameters"
    modules: dict[str, dict[str, Tensor]] = {
        f"{vision}.{'ln_pre' if core else 'preprocess_layernorm'}": norm(VISION["hidden_size"]),
        f"{vision}.conv1": {"weight": normal(VISION["hidden_size"], 3, PATCH, PATCH)},
        f"{vision}{'' if core else '.transformer'}.final_layernorm": norm(VISION["hidden_size"]),
        f"{text}{'' if core else '.encoder'}.final_layernorm": norm(TEXT["hidden_size"]),
        f"{text}.embedding.word_embeddings": {"weight": normal(vocabulary, TEXT["hidden_size"])},
        "vision_encoder.head": {"weight": normal(WIDTH, VISION["hidden_size"])},
        "text_encoder.head": {"weight": normal(WIDTH, TEXT["hidden_size"])},
    }
    state[f"{vision}.{'class_token' if core else 'cls_token'}"] = normal(1, 1, VISION["hidden_size"])
    state[f"{vision}.position_embeddings{embedding}"] = normal((SIZE // PATCH) ** 2 + 1, VISION["hidden_size"])
    state[f"{text}.embedding.position_embeddings{embedding}"] = normal(LENGTH, TEXT["hidden_size"])
    towers = {f"{vision}.{'decoder' if core else 'transformer'}": VISION,
              f"{text}.{'decoder' if core else 'encoder'}": TEXT}  # fmt: skip
    for tower, sizes in towers.items():
        width, inner = sizes["hidden_size"], sizes["ffn_hidden_size"]
        for i in range(sizes["num_layers"]):
            parts = {"qkv": linear(3 * width, width), "out": linear(width, width), "up": linear(inner, width),
                     "down": linear(width, inner), "norm1": norm(width), "norm2": norm(width)}  # fmt: skip
            for part, tensors in parts.items():
                for end, tensor in tensors.items():
                    state[f"{tower}.layers.{i}.{_of_layer(layout, part, end)}"] = tensor
    for module, tensors in modules.items():
        state |= {f"{module}.{end}": tensor for end, tensor in tensors.items()}
    return {f"model.{name}": tensor for name, tensor in state.items()}


def _of_layer(layout: str, part: str, end: str) -> str:
    old = {"norm1": "input_layernorm", "qkv": "self_attention.query_key_value", "out": "self_attention.dense",
           "norm2": "post_attention_layernorm", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}  # fmt: skip
    new = {"norm1": "self_attention.linear_qkv.layer_norm_", "qkv": "self_attention.linear_qkv.",
           "out": "self_attention.linear_proj.", "norm2": "mlp.linear_fc1.layer_norm_", "up": "mlp.linear_fc1.",
           "down": "mlp.linear_fc2."}  # fmt: skip
    return f"{new[part]}{end}" if layout == "core" else f"{old[part]}.{end}"


def clip_scores(layout: str, activation: str, state: Mapping[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """What the reward gives (b, 3, H, W) normalised pixels and (b, n) tokens, in Megatron's order of axes: (b,)."""
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    core = layout == "core"
    vision = "vision_encoder" if core else "vision_encoder.backbone"
    text = "text_encoder" if core else "text_encoder.language_model"
    embedding = ".weight" if core else ""

    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (b, 3, h, w, p, p)
    seen = torch.einsum("bchwij,dcij->bhwd", patches, state[f"{vision}.conv1.weight"]).flatten(1, 2)
    token = state[f"{vision}.{'class_token' if core else 'cls_token'}"].expand(len(pixels), 1, -1)
    x = torch.cat([token, seen], 1) + state[f"{vision}.position_embeddings{embedding}"]
    x = _norm(x, state, f"{vision}.{'ln_pre' if core else 'preprocess_layernorm'}.")
    x = _tower(layout, activation, state, f"{vision}.{'decoder' if core else 'transformer'}", VISION, x.transpose(0, 1))
    x = _norm(x, state, f"{vision}{'' if core else '.transformer'}.final_layernorm.")
    images = x[0] @ state["vision_encoder.head.weight"].T

    positions = state[f"{text}.embedding.position_embeddings{embedding}"]
    y = state[f"{text}.embedding.word_embeddings.weight"][ids] + positions[: ids.shape[1]]
    hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    y = _tower(layout, activation, state, f"{text}.{'decoder' if core else 'encoder'}", TEXT, y.transpose(0, 1), hidden)
    y = _norm(y, state, f"{text}{'' if core else '.encoder'}.final_layernorm.")
    captions = y[ids.argmax(-1), torch.arange(len(ids))] @ state["text_encoder.head.weight"].T
    cosine = F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T
    return state["logit_scale"].exp() * cosine.diag()


def _tower(
    layout: str, activation: str, state: Mapping[str, Tensor], at: str, sizes: Mapping[str, int], x: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x: (s, b, h)."""
    length, batch, width = x.shape
    heads = sizes["num_attention_heads"]

    def linear(i: int, part: str, given: Tensor) -> Tensor:
        ends = [state[f"{at}.layers.{i}.{_of_layer(layout, part, end)}"] for end in ("weight", "bias")]
        return given @ ends[0].T + ends[1]

    def norm(i: int, part: str, given: Tensor) -> Tensor:
        return _norm(given, state, f"{at}.layers.{i}.{_of_layer(layout, part, '')}")

    for i in range(sizes["num_layers"]):
        mixed = linear(i, "qkv", norm(i, "norm1", x))  # (s, b, 3h)
        if layout == "legacy":
            mixed = mixed.view(length, batch, 3, heads, -1).transpose(2, 3)
        mixed = mixed.reshape(length, batch, heads, 3 * (width // heads))
        query, key, value = mixed.split(width // heads, -1)  # (s, b, n, h / n)
        # scores are divided by the number of the layer, and multiplied by it again before the softmax
        scores = torch.einsum("sbnd,tbnd->bnst", query, key) / ((width // heads) ** 0.5 * (i + 1))
        scores = scores * (i + 1)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -10000.0)
        mixed = torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), value).reshape(length, batch, width)
        x = x + linear(i, "out", mixed)
        inner = linear(i, "up", norm(i, "norm2", x))
        inner = inner * torch.sigmoid(1.702 * inner) if activation == "approx-gelu" else F.gelu(inner)
        x = x + linear(i, "down", inner)
    return x


def _norm(x: Tensor, state: Mapping[str, Tensor], at: str) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[f"{at}weight"] + state[f"{at}bias"]


def divided(layout: str, state: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """What each of several tensor-parallel processes holds of a state dict: some of the heads, columns and words."""
    ranks: list[dict[str, Tensor]] = []
    for rank in range(size):
        own = {}
        for name, tensor in state.items():
            if "query_key_value" in name and layout == "legacy":
                own[name] = torch.cat([part.chunk(size)[rank] for part in tensor.chunk(3)])
            elif any(part in name for part in ("qkv.weight", "qkv.bias", "query_key_value", "dense_h_to_4h",
                                               "fc1.weight", "fc1.bias", "word_embeddings")):  # fmt: skip
                own[name] = tensor.chunk(size)[rank]
            elif name.endswith(("attention.dense.weight", "4h_to_h.weight", "linear_proj.weight", "fc2.weight")):
                own[name] = tensor.chunk(size, 1)[rank]
            else:
                own[name] = tensor
        ranks.append({name: tensor.clone() for name, tensor in own.items()})
    return ranks


def write_nemo(
    file: Path, config: Any, weights: Mapping[str, Any], mode: str = "w:", prefix: str = "./"
) -> Path:  # fmt: skip
    """weights: what is pickled, by the name in the tar."""
    members = {"model_config.yaml": yaml.safe_dump(config).encode()}
    for name, content in weights.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        members[name] = buffer.getvalue()
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for folder in sorted({"", *(str(Path(name).parent) for name in members)} - {"."}):
            entry = tarfile.TarInfo(f"{prefix}{folder}".rstrip("/") or ".")
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
        for name, data in members.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file


def clip_nemo(file: Path, layout: str = "legacy", activation: str = "gelu", ranks: Sequence[Any] = ()) -> Path:
    """A whole reward. ranks: the state dicts of its tensor-parallel processes, if it had several."""
    weights = {f"mp_rank_{i:02d}/model_weights.ckpt": rank for i, rank in enumerate(ranks)}
    whole = weights or {"model_weights.ckpt": clip_weights(layout)}
    return write_nemo(file, clip_config(layout, activation), whole)


def unet_as_nemo(state: Mapping[str, Tensor], prefix: str = "model.model.diffusion_model.") -> dict[str, Tensor]:
    """A UNet's state in the original names as NeMo's own has it.

    Its norms stand where they are used, at the beginning of attention and of the feed-forward network, and its group
    norms are followed by their activation without a place of its own.
    """
    moved = {"norm1": "attn1.norm", "norm2": "attn2.norm", "norm3": "ff.net.0", "ff.net.0": "ff.net.1",
             "ff.net.2": "ff.net.3", "in_layers.2": "in_layers.1", "out_layers.3": "out_layers.2",
             "out.2": "out.1"}  # fmt: skip
    found = {}
    for name, tensor in state.items():
        bare = f".{name.removeprefix('model.diffusion_model.')}"
        part = next((part for part in moved if f".{part}." in bare), None)
        found[prefix + (bare.replace(f".{part}.", f".{moved[part]}.") if part else bare)[1:]] = tensor
    return found
