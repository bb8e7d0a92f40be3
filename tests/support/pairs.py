"""Preference pairs with a rule that can be learned, and a CLIPModel small enough to learn it in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 32
ANIMALS = "cat dog bee fox pig cow hen ant bat elk".split()


def save_tiny_clip(directory: Path, seed: int = 0) -> Path:
    """A randomly initialised CLIPModel for pictures of 32 pixels, with tokenizer and preprocessing."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from draftplus.rewards.clip import EMOJI_CLIP

    tokenizer = AutoTokenizer.from_pretrained(EMOJI_CLIP)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={
            **layers, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=2.6,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(directory)
    return directory


def save_pairs(directory: Path, count: int = 60, ties: int = 6, label: float = 1.0) -> Path:
    """A JSONL of pairs of a bright and a dark picture, of which the bright one is preferred; every `ties`-th a tie."""
    directory.mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(0), []
    for i in range(count):
        for side, mean in (("bright", 170), ("dark", 80)):
            picture = (mean + random.normal(0, 20, (SIZE + 8, SIZE, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(directory / f"{i}-{side}.png")
        first, tie = bool(random.integers(2)), i % ties == ties - 1
        names = [f"{i}-bright.png", f"{i}-dark.png"][:: 1 if first else -1]
        preferred = 0.5 if tie else label if first else 1 - label
        row = {"jpg_0": names[0], "jpg_1": names[1], "label_0": preferred, "label_1": 1 - preferred}
        lines.append(json.dumps({**row, "caption": f"a {ANIMALS[i % len(ANIMALS)]}"}) + "\n")
    (directory / "pairs.jsonl").write_text("".join(lines))
    return directory / "pairs.jsonl"


def save_recipe(directory: Path) -> Path:
    """A recipe of a run of 6 steps in directory/runs/run, with its pairs and its model beside it."""
    pairs, model = save_pairs(directory / "pairs"), save_tiny_clip(directory / "clip")
    recipe = directory / "reward.yaml"
    recipe.write_text(f"""
task: reward
name: run
output_dir: {directory / "runs"}
device: cpu
model: {{path: {model}}}
data: {{pairs: {pairs}, held_out: 0.2}}
optim: {{lr: 0.003, warmup_steps: 1}}
train: {{steps: 6, global_batch_size: 8, micro_batch_size: 8}}
eval: {{every: 3, worst: 3}}
checkpoint: {{every: 2}}
log: {{to: []}}
""")
    return recipe
