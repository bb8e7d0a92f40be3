"""What the tests over families know of each: how its stock pipeline is called, and what it can do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.config import LoraConfig, ModelConfig
from draftplus.models.families import family_of
from draftplus.models.pipeline import PipelineModel
from tests.support.pipelines import stock
from tests.tiny import CPU

SIZES = ((64, 64), (96, 64))  # height, width
PROMPTS = ("a cat on a mat", "two dogs", "the red bee of a long summer's day, in oil")


@dataclass(frozen=True)
class Case:
    """A tiny pipeline of `tests.support.pipelines`.

    guided, plain: guidance scales with guidance on and off, or two that differ. negative: whether there are negative
    prompts. needs: one without which there is no guidance. scale: how stock calls the guidance scale. sizes: (height,
    width). arguments: further ones of every call.
    """

    guided: float = 4.0
    plain: float = 1.0
    negative: bool = True
    needs: str | None = None
    scale: str = "guidance_scale"
    sizes: tuple[tuple[int, int], ...] = SIZES
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def call(self, size: tuple[int, int], steps: int, scale: float, negative: str | None = None) -> dict[str, Any]:
        """Arguments of the stock pipeline."""
        told = {"height": size[0], "width": size[1], "num_inference_steps": steps, self.scale: scale}
        return {**told, **({"negative_prompt": negative} if negative is not None else {}), **self.arguments}

    def overrides(self, size: tuple[int, int], steps: int, scale: float, negative: str | None = None) -> list[str]:
        """The same for draftplus."""
        told = {"height": size[0], "width": size[1], "steps": steps, "guidance_scale": scale}
        told |= {"negative_prompt": negative} if negative is not None else {}
        return ["device=cpu", *(f"sampler.{key}={value}" for key, value in told.items())]


CASES = {
    "sdxl": Case(),
    "sd3": Case(),
    "sd3_without_t5": Case(),
    "flux_dev": Case(negative=False),
    "chroma": Case(),
    "flux2_klein_base": Case(negative=False),
    "qwen_image": Case(needs="a red dog", scale="true_cfg_scale"),
    "zimage": Case(plain=0.0),
}

ONCE = [name for name in CASES if name != "sd3_without_t5"]  # what training does is the same without T5


def load_model(
    directory: Path, dtype: torch.dtype = torch.float64, trainable: bool = True, **settings: Any
) -> PipelineModel:
    """The model of a directory, in float64 unless said otherwise, with LoRA on its attention."""
    config = ModelConfig(path=str(directory), **{"lora": LoraConfig(rank=2, alpha=4.0), **settings})
    module, _, name = family_of(config).load.partition(":")
    load = getattr(importlib.import_module(module), name)
    return load(config, str(directory), CPU, dtype=dtype, trainable=trainable)


@contextmanager
def drawing(pipe: Any, noise: Tensor) -> Iterator[None]:
    """Inside, the stock pipeline starts from this noise, (b, c, h, w) or the same in another shape."""
    module = sys.modules[type(pipe).__module__]
    before = module.randn_tensor  # type: ignore[attr-defined]
    module.randn_tensor = lambda shape, dtype=None, **_: noise.reshape(shape).to(dtype)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = before  # type: ignore[attr-defined]


def stock_picture(pipe: Any, prompt: str, seed: int, **arguments: Any) -> Tensor:
    """The stock pipeline's picture, (1, 3, H, W) in [0, 1]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, output_type="pt", **arguments).images.float()


def stock_pipe(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of a directory, ready to be called."""
    return stock(directory, dtype)
