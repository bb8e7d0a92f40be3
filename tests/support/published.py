"""Tiny random weights laid out as reward models publish theirs, and pictures to score; NumPy draws alike everywhere.

Read by the tests and, in the environments of the original packages, by the scripts in `tests/parity/originals/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIZES = [(64, 64), (97, 131), (150, 71), (40, 40)]  # the first is what the networks take; the others are resized
PROMPTS = [
    "a red fox, sleeping",
    "a naïve blue-ish zebra on 3 cubes [ENC] 漢 ☃",
    "a very long caption of a zebra and a fox " * 6,
    "",
]


def pictures() -> list[np.ndarray]:
    """(H, W, 3) uint8 pictures of `SIZES`: waves and a little noise."""
    found = []
    for number, (height, width) in enumerate(SIZES):
        draw = np.random.RandomState(number)
        rows, columns = np.mgrid[:height, :width] / 64
        waves = [np.sin(a * rows + b * columns + c) for a, b, c in draw.uniform(1, 8, (3, 3))]
        values = 0.5 + 0.35 * np.stack(waves, -1) + 0.03 * draw.standard_normal((height, width, 3))
        found.append((values.clip(0, 1) * 255).round().astype(np.uint8))
    return found


def drawn(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these names. Matrices keep the size of what they are applied to; what embeds is small, so that
    the ε of a norm matters; scales of norms are about 1.
    """
    draw = np.random.RandomState(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = 0.03 * draw.standard_normal(shape)
        if len(shape) == 1 and "norm" in name.lower() and name.endswith("weight"):
            values += 1
        elif len(shape) > 1 and "embed" not in name:
            values *= np.prod(shape[1:]) ** -0.5 / 0.03
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return tensors


BERT_VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "-", "3", "[", "]", "a", "red", "fox", "sleep", "##ing", "naive",
    "blue", "is", "##h", "zebra", "on", "cube", "##s", "very", "long", "cap", "##tion", "of", "and", "漢", "en", "##c",
]  # fmt: skip


def save_bert_vocabulary(directory: Path) -> Path:
    """vocab.txt as bert-base-uncased has it, with few words; what else is published there says the defaults."""
    (directory / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n", encoding="utf-8")
    return directory / "vocab.txt"


def image_reward(
    vision: int = 128, text: int = 64, layers: tuple[int, int] = (2, 2), words: int = len(BERT_VOCABULARY) + 2,
    grid: int = 4, positions: int = 40,
) -> dict[str, Tensor]:  # fmt: skip
    """ImageReward.pt: tensors by name, nothing around them, in float32; of true size but for these numbers.

    vision, text: widths, in heads of 64. layers: of the two. grid: patches of 16 pixels on a side.
    """
    shapes: dict[str, Sequence[int]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes.update({f"{eye}.cls_token": (1, 1, vision), f"{eye}.pos_embed": (1, grid * grid + 1, vision)})
    shapes.update({f"{eye}.patch_embed.proj.weight": (vision, 3, 16, 16), f"{eye}.patch_embed.proj.bias": (vision,)})
    for i in range(layers[0]):
        norm(f"{eye}.blocks.{i}.norm1", vision)
        linear(f"{eye}.blocks.{i}.attn.qkv", 3 * vision, vision)
        linear(f"{eye}.blocks.{i}.attn.proj", vision, vision)
        norm(f"{eye}.blocks.{i}.norm2", vision)
        linear(f"{eye}.blocks.{i}.mlp.fc1", 4 * vision, vision)
        linear(f"{eye}.blocks.{i}.mlp.fc2", vision, 4 * vision)
    norm(f"{eye}.norm", vision)
    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (words, text)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (positions, text)
    norm(f"{reader}.embeddings.LayerNorm", text)
    for i in range(layers[1]):
        for attention, width in (("attention", text), ("crossattention", vision)):
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.query", text, text)
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.key", text, width)
            linear(f"{reader}.encoder.layer.{i}.{attention}.self.value", text, width)
            linear(f"{reader}.encoder.layer.{i}.{attention}.output.dense", text, text)
            norm(f"{reader}.encoder.layer.{i}.{attention}.output.LayerNorm", text)
        linear(f"{reader}.encoder.layer.{i}.intermediate.dense", 4 * text, text)
        linear(f"{reader}.encoder.layer.{i}.output.dense", text, 4 * text)
        norm(f"{reader}.encoder.layer.{i}.output.LayerNorm", text)
    linear("blip.vision_proj", 256, vision)
    linear("blip.text_proj", 256, text)
    for i, (into, out) in zip((0, 2, 4, 6, 7), ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        linear(f"mlp.layers.{i}", out, into)
    count = {f"{reader}.embeddings.position_ids": torch.arange(positions)[None]}  # the one that is not float
    return drawn(shapes) | count
