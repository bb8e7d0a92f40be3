"""A `CLIPModel` that learns which of two pictures is preferred, and the loss that PickScore was trained with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftplus.errors import UserError
from draftplus.rewards.checkpoints import locate, read_json
from draftplus.rewards.clip import EMOJI_CLIP, ClipReward, load_clip_reward
from draftplus.rewards.preprocessing import Preprocessing, preprocess

TOWERS = {
    "image": ("vision_model", "visual_projection"),
    "text": ("text_model", "text_projection"),
}


def preference_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) against soft labels, minus the labels' entropy (Kirstain et al. 2023): the
    Kullback-Leibler divergence, zero where the probabilities are the labels, also of a tie.

    scores: (n, 2) of both pictures. labels: (n,), how much the first is preferred, in [0, 1]. Returns (n,).
    """
    wanted = torch.stack([labels, 1 - labels], 1)  # (n, 2)
    return (torch.xlogy(wanted, wanted) - wanted * scores.log_softmax(1)).sum(1)


@dataclass(frozen=True)
class ClipPreference:
    """exp(logit_scale)·cos of a picture and its caption, with gradient to the weights.

    processor: the settings of preprocessing as the checkpoint has them, to be saved with the weights. precision: in
    which the networks compute; weights stay as they are.
    """

    reward: ClipReward
    processor: dict[str, Any]
    towers: tuple[str, ...]
    precision: torch.dtype = torch.float32

    @property
    def model(self) -> Any:
        return self.reward.model

    @property
    def length(self) -> int:
        """Tokens of a caption, beyond which it is cut."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def resizing(self) -> Preprocessing:
        """What is done to a picture once: its size, without the scaling of values."""
        return replace(self.reward.preprocessing, scale=1.0, mean=None, std=None)

    @property
    def scaling(self) -> Preprocessing:
        """What is done to a resized picture before the network."""
        return replace(self.reward.preprocessing, resize=None, crop=None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def scores(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """pictures: (n, 2, 3, h, w) uint8 of the network's size, two for each of n captions. Returns (n, 2)."""
        text = self._text(captions)  # (n, d)
        flat = pictures.flatten(0, 1).to(self.model.device)
        pixels = preprocess(flat / 255, self.scaling).to(self.model.dtype)  # (2n, 3, h, w)
        with self._computing("image"):
            features = _normalized(self.model.get_image_features(pixel_values=pixels).pooler_output)  # (2n, d)
        cosine = (features.unflatten(0, (-1, 2)) * text[:, None]).sum(-1)  # (n, 2)
        return self.model.logit_scale.to(cosine.dtype).exp() * cosine

    def too_long(self, captions: Sequence[str]) -> int:
        """How many captions have more tokens than the text encoder reads."""
        return sum(len(ids) > self.length for ids in self.reward.tokenizer(list(captions))["input_ids"])

    def save(self, directory: Path) -> None:
        """Writes a `CLIPModel` directory, with tokenizer and preprocessing."""
        self.model.save_pretrained(directory)
        self.reward.tokenizer.save_pretrained(directory)
        text = json.dumps(self.processor, indent=2) + "\n"
        (directory / "preprocessor_config.json").write_text(text, encoding="utf-8")

    @contextmanager
    def _computing(self, tower: str) -> Iterator[None]:
        half = self.precision in (torch.bfloat16, torch.float16)
        lower = torch.autocast(self.model.device.type, self.precision) if half else nullcontext()
        with torch.set_grad_enabled(tower in self.towers and torch.is_grad_enabled()), lower:
            yield

    def _text(self, captions: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(captions))
        tokens = self.reward.tokenizer(
            distinct, truncation=True, max_length=self.length, padding=True, return_tensors="pt"
        )
        given = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        with self._computing("text"):
            features = _normalized(self.model.get_text_features(**given).pooler_output)
        at = {caption: i for i, caption in enumerate(distinct)}
        return features[[at[caption] for caption in captions]]


def _normalized(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def load_preference(
    path: str, processor: str | None, revision: str | None, towers: str, logit_scale: bool, checkpointing: bool,
    device: torch.device, dtype: torch.dtype = torch.float32, precision: torch.dtype | None = None,
) -> ClipPreference:  # fmt: skip
    """The model of `path`, "emoji_clip", a directory or a hub id, ready to learn.

    towers: which learn, "both", "image" or "text". logit_scale: whether it does, too. checkpointing: whether
    activations are computed again in the backward pass. dtype: of the weights. precision: in which the networks compute
    (`torch.autocast`); None: that of the weights.

    Raises UserError as `load_clip_reward` does.
    """
    start = str(EMOJI_CLIP) if path == "emoji_clip" else path
    try:
        reward = load_clip_reward(start, processor, "logit", revision, device, dtype)
    except UserError as error:  # which speaks of a reward's own arguments
        raise UserError(str(error).replace("args.processor", "model.processor")) from None
    model, chosen = reward.model, tuple(TOWERS) if towers == "both" else (towers,)
    for tower in chosen:
        for part in TOWERS[tower]:
            getattr(model, part).requires_grad_(True)
    model.logit_scale.requires_grad_(logit_scale)
    if checkpointing:
        for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
            layer.self_attn.dropout = 0.0  # the only noise of a CLIP in training mode, without which none is recomputed
        with warnings.catch_warnings():  # the next version of transformers calls it by another name
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    settings = _processor(processor or start, None if processor else revision)
    return ClipPreference(reward, settings, chosen, precision or dtype)


def _processor(path: str, revision: str | None) -> dict[str, Any]:
    source = locate(path)
    told = read_json(source, "preprocessor_config.json", revision)
    if told is None:
        told = (read_json(source, "processor_config.json", revision) or {}).get("image_processor")
    assert isinstance(told, dict), "the preprocessing was read before"
    return told
