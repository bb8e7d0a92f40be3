"""The tiny model with what a family of large text encoders does: a store of embeddings, and an encoder that goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draftplus.models import families, stable_diffusion
from draftplus.models.embedding_store import EmbeddingStore
from draftplus.models.embeddings import Embeddings
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.progress import Advance
from draftplus.types import Conditioning
from tests.support.runs import train_here

EMBEDDED: list[str | None] = []  # every prompt that an encoder of this process was called with
LOADED: list[StableDiffusion] = []


class Stored(StableDiffusion):
    """`text_encoder` is None until it is needed, and once prompts are prepared. loads: how often it was needed."""

    loads = 0

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._kept, self.text_encoder = self.text_encoder, None
        store = EmbeddingStore(lambda: {"encoder": "tiny"}, self.device)
        self.encode = Embeddings(self._counted, self.tuned.encoders_state, store)

    @property
    def noise_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._kept.dtype
        return dtype

    def _counted(self, prompt: str | None) -> Conditioning:
        EMBEDDED.append(prompt)
        if self.text_encoder is None:
            self.loads += 1
            self.text_encoder = self._kept
        return self._embed(prompt)

    def prepare(self, prompts: Sequence[str | None], advance: Advance, share: tuple[int, int] = (0, 1)) -> None:
        if self.encode.prepare(prompts, advance, share):
            self.text_encoder = None

    def predict(self, latents: Any, timestep: Any, conditioning: Conditioning) -> Any:
        assert self.text_encoder is None, "the text encoder lies in memory beside the denoiser"
        return super().predict(latents, timestep, conditioning)


def load(config: Any, path: str, device: torch.device, seed: int = 0, trainable: bool = True) -> Stored:
    """Takes the place of the family's loader."""
    made = stable_diffusion.load(config, path, device, seed=seed, trainable=trainable)
    LOADED.append(Stored(made.tuned, made.vae, made.text_encoder, made.tokenizer, made.scheduler_config))
    return LOADED[-1]  # type: ignore[return-value]


def stored_family() -> families.Family:
    """The entry of `FAMILIES` for it."""
    return replace(families.FAMILIES["StableDiffusionPipeline"], load=f"{__name__}:load")


def train_on_a_rank(settings: list[str], cache: str) -> None:
    """A training in this process, which writes how many prompts it embedded, and how often it loaded the encoder."""
    os.environ["DRAFTPLUS_CACHE"] = cache
    families.FAMILIES["StableDiffusionPipeline"] = stored_family()
    train_here(settings)
    Path("calls.txt").write_text(f"{len(EMBEDDED)} {sum(one.loads for one in LOADED)}")
