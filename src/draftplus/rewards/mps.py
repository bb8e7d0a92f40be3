"""MPS (Zhang et al. 2024): a CLIP whose image tokens read those words of the prompt that matter for a condition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftplus.distributed import sent
from draftplus.errors import UserError
from draftplus.rewards.captions import Captions, load_tokenizer, tokenizer_beside
from draftplus.rewards.checkpoints import fit, lacks, load_weights_file, locate, read_json
from draftplus.rewards.clip import PICKSCORE_PROCESSOR
from draftplus.rewards.preprocessing import Preprocessing, preprocess, read_preprocessing
from draftplus.types import Reward

WEIGHTS = "RE-N-Y/mpsv1"  # the authors' own file is a pickle of the whole program, which loading would run
FILE = "model.safetensors"
# the authors' for the overall preference, on which the published weights were trained
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.01  # of the greatest similarity with the condition: tokens below it are not read
CACHED = 512  # prompts, of 0.3 MB each
_HEAD_DIM = 64
_ROW = re.compile(r"model\.(text|vision)_model\.embeddings\.position_ids")  # a buffer of older transformers


class Cross(nn.Module):
    """Attention of image tokens to text tokens, with one head of keys and values for all of queries, beside an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * _HEAD_DIM, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD_DIM, bias=False)
        self.to_out = nn.Linear(heads * _HEAD_DIM, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False), Gate(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, text: Tensor, read: Tensor) -> Tensor:
        """x: (b, n, d); text: (b, m, d); read: (b, m), true where a token of the text is read."""
        x = self.norm(x)
        k, v = self.to_kv(text).chunk(2, -1)  # (b, m, 64) each
        attended = attend(self.to_q(x), k, v, self.heads, read[:, None, None])
        return self.to_out(attended) + self.ff(x)


class Self(nn.Module):
    """Attention among image tokens with rotary positions, likewise with one head of keys and values, beside an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (heads * _HEAD_DIM, _HEAD_DIM, _HEAD_DIM, 8 * width)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = Rotary()
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * _HEAD_DIM, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, d)."""
        q, k, v, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, -1)
        q = self.rotary_emb(q.unflatten(-1, (self.heads, _HEAD_DIM)).transpose(1, 2)).transpose(1, 2).flatten(2)
        return self.attn_out(attend(q, self.rotary_emb(k), v, self.heads)) + self.ff_out(hidden)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q: (b, n, heads · 64); k, v: (b, m, 64) for all heads (Shazeer 2019). Returns (b, n, heads · 64)."""
    q = q.unflatten(-1, (heads, _HEAD_DIM)).transpose(1, 2)  # (b, heads, n, 64)
    k, v = (one[:, None].expand(-1, heads, -1, -1) for one in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) of halves, not of neighbours, at the frequencies that the file has."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(_HEAD_DIM // 2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, n, 64)."""
        angles = torch.arange(x.shape[-2], device=x.device).to(x.dtype)[:, None] * self.inv_freq  # (n, 32)
        sin, cos = angles.sin(), angles.cos()
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Gate(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return F.silu(gate) * hidden


class Network(nn.Module):
    """The published network, with the names of its tensors; the numbers of layers and heads are those of the file."""

    def __init__(self, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        self.model = CLIPModel(CLIPConfig(**config))
        width, layers = self.model.config.projection_dim, 0
        while f"cross_model.layers.{layers}.0.fn.to_q.weight" in tensors:
            layers += 1
        heads = len(tensors["cross_model.layers.0.0.fn.to_q.weight"]) // _HEAD_DIM if layers else 1
        blocks = [[nn.ModuleDict({"fn": block(width, heads)}) for block in (Cross, Self)] for _ in range(layers)]
        self.cross_model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleList(pair) for pair in blocks)})

    def tokens(self, ids: Tensor) -> Tensor:
        """ids: (b, n), all of them read, also the padding. Returns (b, n, d)."""
        return self.model.text_projection(self.model.text_model(ids).last_hidden_state)

    def forward(self, pixels: Tensor, text: Tensor, read: Tensor) -> Tensor:
        """pixels: (b, 3, h, w) normalised; text: (b, n, d) tokens; read: (b, n) bool. Returns (b, d)."""
        x = self.model.visual_projection(self.model.vision_model(pixels).last_hidden_state)  # (b, patches + 1, d)
        layers: Any = self.cross_model["layers"]
        for cross, within in layers:
            x = x + cross["fn"](x, text, read)
            x = x + within["fn"](x)
        return x[:, 0]


class Mps:
    """exp(logit_scale)·cos of the prompt and of what the picture's first token has read of it."""

    differentiable = True

    def __init__(self, network: Network, captions: Captions, preprocessing: Preprocessing) -> None:
        self.network = network
        self.captions = captions
        self.preprocessing = preprocessing
        self._text = lru_cache(CACHED)(self._encode)
        self._condition: Tensor | None = None  # (n, d)

    @property
    def divisible(self) -> list[nn.Module]:
        """What sees the picture; prompts that are known are not encoded again, and processes know different ones."""
        layers: Any = self.network.cross_model["layers"]
        return [self.network.model.vision_model, *(block["fn"] for pair in layers for block in pair)]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,) in float32, or wider if the weights are."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        encoded = [self._text(prompt) for prompt in prompts]
        tokens, read, whole = (torch.stack(one) for one in zip(*encoded, strict=True))  # (b, n, d), (b, n), (b, d)
        pixels = preprocess(images, self.preprocessing).to(tokens.dtype)  # (b, 3, h, w)
        picture = self.network(pixels, tokens, read)  # (b, d)
        wide = torch.promote_types(picture.dtype, torch.float32)
        cosine = (F.normalize(picture.to(wide), dim=-1) * F.normalize(whole.to(wide), dim=-1)).sum(-1)
        return self.network.model.logit_scale.to(wide).exp() * cosine

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d) tokens, (n,) which of them are read, and (d,) the whole; of one prompt, so that no other matters."""
        device = self.network.model.logit_scale.device
        if self._condition is None:
            ids, _ = self.captions.tokens(CONDITION)
            self._condition = self.network.tokens(sent(ids[None], device))[0]
        ids, _ = self.captions(prompt)
        tokens = self.network.tokens(sent(ids[None], device))[0]  # (n, d)
        similar = (tokens @ self._condition.T).amax(1)  # (n,)
        # the end is the greatest id, and its first occurrence where padding repeats it
        return tokens, similar / similar.max() > THRESHOLD, tokens[ids.argmax()]


def load_mps(
    path: str | Path = WEIGHTS,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: str | None = None,
    revision: str | None = None,
) -> Reward:
    """MPS for the overall preference, exp(logit_scale)·cos.

    path: a file of tensors, a directory with model.safetensors, or a hub id, at `revision`. processor: directory or hub
    id of the CLIP that it was tuned from: its config.json, tokenizer and preprocessing; None: the directory of the
    weights if it has them, else laion's ViT-H/14. dtype: of the weights, float32 unless given. UserError if files are
    missing, damaged or another reward's, and for the authors' own file, which is a program.
    """
    where = f"reward.mps.path '{path}'"
    tensors = {name.removeprefix("mps."): one for name, one in load_weights_file(path, FILE, revision, "mps").items()}
    tensors = {name: one for name, one in tensors.items() if not _ROW.fullmatch(name)}
    if not any(name.startswith("cross_model.") for name in tensors):
        raise UserError(f"{where} has not the weights of MPS: no tensor's name begins with cross_model.")
    source = processor or tokenizer_beside(path) or PICKSCORE_PROCESSOR
    tokenizer = load_tokenizer("mps", source)
    config = read_json(locate(source), "config.json")
    if config is None or config.get("model_type") != "clip":
        raise UserError(
            f"{lacks(locate(source), 'config.json')} of a CLIP: set reward.mps.args.processor to one that has."
        )
    network: Network = fit(partial(Network, config, tensors), tensors, where, dtype).to(device)
    preprocessing = read_preprocessing(locate(source))
    length = network.model.config.text_config.max_position_embeddings
    return Mps(network, Captions("mps", tokenizer, length), preprocessing)
