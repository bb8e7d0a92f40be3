"""What the original packages of rewards say of drawn weights and pictures, and the same weights for our own loaders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.models.single_file import CONFIGS, tokenizer
from draftplus.rewards.hpsv2 import of_transformers
from tests.parity.rewards.drawn import CLIP, PROMPTS, pictures, weights

CLIP_SAYS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "parity" / "rewards" / "clip.json").read_text(encoding="utf-8")
)


def drawn(names: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Tensors in float16 by their names and shapes."""
    return {name: torch.from_numpy(weights(name, shape)) for name, shape in names.items()}


def images(height: int, width: int) -> Tensor:
    """The pictures that the originals were given: (4, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures(height, width)).permute(0, 3, 1, 2).float() / 255


def spread(case: str) -> float:
    """The range of an original's scores."""
    scores = [score for one in CLIP_SAYS["scores"][case] for score in one["scores"]]
    return max(scores) - min(scores)


def errors(case: str, reward: Any) -> dict[tuple[int, int], float]:
    """By size of the pictures: the largest difference from the original's scores, as a share of their range."""
    found = {}
    for one in CLIP_SAYS["scores"][case]:
        scores = reward(images(*one["size"]), PROMPTS)
        difference = (scores - torch.tensor(one["scores"])).abs().max().item()
        found[tuple(one["size"])] = difference / spread(case)
    return found


def slopes(reward: Any, height: int, width: int, prompt: str = "a cat") -> tuple[float, float]:
    """The derivative along a random direction, by the gradient and by a central difference. reward: in float64."""
    image = (0.2 + 0.6 * images(height, width)[:1].double()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image, [prompt]).sum(), image)
    direction = torch.randn(image.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        up, down = (reward(image + h * direction, [prompt]).item() for h in (1e-5, -1e-5))
    return (gradient * direction).sum().item(), (up - down) / 2e-5


def published_names() -> dict[str, list[int]]:
    """Names and shapes of HPSv2's tensors at the published size, in open_clip's order of parts."""
    blocks = {"transformer.": 24, "visual.transformer.": 32}
    named = {}
    for name, shape in CLIP_SAYS["published"].items():
        before, first, after = name.partition("resblocks.0.")
        if not first:
            named[name] = shape
        for index in range(blocks[before] if first else 0):
            named[f"{before}resblocks.{index}.{after}"] = shape
    return named


def clip_config(act: str = "gelu", projection: int = 64) -> dict[str, Any]:
    """The drawn network as transformers' CLIPConfig takes it."""
    text, vision = CLIP["text_cfg"], CLIP["vision_cfg"]
    return {
        "projection_dim": projection,
        "text_config": {
            "hidden_size": text["width"], "intermediate_size": 4 * text["width"], "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"], "hidden_act": act, "bos_token_id": 49406, "eos_token_id": 49407,
        },
        "vision_config": {
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // vision["head_width"],
            "patch_size": vision["patch_size"], "image_size": vision["image_size"], "hidden_act": act,
        },
    }  # fmt: skip


def save_tokenizer(directory: Path) -> Path:
    """CLIP's own, as its checkpoints on the hub have it."""
    tokenizer(CONFIGS / "sd1").save_pretrained(directory)
    return directory


def save_clip(directory: Path, act: str = "gelu", projection: int = 64) -> Path:
    """The drawn network as a checkpoint of transformers, in float16, with its processor."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    names = dict(CLIP_SAYS["names"]["clip"])
    names["text_projection"], names["visual.proj"] = (
        [names[one][0], projection] for one in ("text_projection", "visual.proj")
    )
    model = CLIPModel(CLIPConfig(**clip_config(act, projection))).half()
    model.load_state_dict(of_transformers(drawn(names)))
    model.save_pretrained(directory)
    CLIPImageProcessorPil().save_pretrained(directory)
    return save_tokenizer(directory)
