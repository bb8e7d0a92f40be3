"""Rewards without weights: of those that are a CLIP the true network, of others only what is known."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.config import RewardConfig
from draftplus.planning.meter import META
from draftplus.rewards.aesthetic import CLIP_L, Aesthetic, Head
from draftplus.rewards.clip import CLIP_H, CLIP_SCORE, EMOJI_CLIP, PICKSCORE, ClipReward
from draftplus.rewards.dissimilarity import Dissimilarity
from draftplus.rewards.hpsv2 import HPSV2, VIT_H
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from draftplus.types import Reward

# the published configurations of what the built-in rewards are by default, so that planning needs no network
_VIT_L = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
PUBLISHED: dict[str, Mapping[str, Any]] = {
    PICKSCORE: VIT_H, CLIP_H: VIT_H, HPSV2: VIT_H, CLIP_L: _VIT_L, CLIP_SCORE: {},  # whose are transformers' defaults
}  # fmt: skip
_CLIPS = {
    "emoji_clip": str(EMOJI_CLIP), "pickscore": PICKSCORE, "clip_score": CLIP_SCORE, "clip_h": CLIP_H, "hpsv2": HPSV2,
    "dissimilarity": str(EMOJI_CLIP), "aesthetic": CLIP_L,
}  # fmt: skip


@dataclass(frozen=True)
class Uncounted:
    """In place of a reward whose network is not known: it takes no memory. Its score is the images' mean."""

    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).float().mean(1)


def bare_reward(name: str, settings: RewardConfig, differentiable: bool = True) -> Reward:
    """A reward of a built-in name without weights, on the meta device; `Uncounted` for one whose network is not known.

    differentiable: whether the run differentiates it.
    """
    config = _configuration(name, settings)
    if config is None:
        return Uncounted(differentiable)
    from transformers import CLIPConfig, CLIPModel

    with META:
        model: Any = CLIPModel(CLIPConfig(**config)).requires_grad_(False).eval()
    size = model.config.vision_config.image_size
    preprocessing = Preprocessing((size, size), "bicubic", (size, size), 1.0, CLIP_MEAN, CLIP_STD)
    dropout = settings.args.get("dropout") or 0.0
    reward = ClipReward(model, _tokens, preprocessing, "logit", dropout, settings.args.get("negative"))
    if name == "aesthetic":
        del model.text_model, model.text_projection
        with META:
            head = Head().requires_grad_(False)
        return Aesthetic(reward.image_features, head, reward.divisible)
    if name == "dissimilarity":
        return Dissimilarity(reward.image_features, divisible=reward.divisible)
    return reward


def _configuration(name: str, settings: RewardConfig) -> Mapping[str, Any] | None:
    """Of the CLIP that a reward is: of its directory, or of the hub's cache, else the published one of its default."""
    if name != "clip" and name not in _CLIPS:
        return None
    given = settings.args.get("clip") if name == "aesthetic" else settings.path
    path = str(given or _CLIPS.get(name, ""))
    if name == "hpsv2":
        return VIT_H
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        if path in PUBLISHED:
            return PUBLISHED[path]
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json", revision=settings.args.get("revision"))
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    told = json.loads(file.read_text(encoding="utf-8"))
    return told if told.get("model_type") == "clip" else None


def _tokens(texts: Sequence[str], max_length: int, **_: Any) -> dict[str, Tensor]:
    """As many tokens as there can be before a text is cut."""
    return {name: torch.ones(len(texts), max_length - 1, dtype=torch.long) for name in ("input_ids", "attention_mask")}
