"""What a family of models is to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from draftplus.types import Model


@dataclass(frozen=True)
class Family:
    """A row of the table of families, at the end of each family's file.

    name: as messages show it. load: (model configuration, path, device, seed, trainable) -> the model, the first two by
    position. sampler: what its stock pipeline does where a key of `sampler` is null: steps, guidance_scale and
    negative_prompt.
    """

    name: str
    load: Callable[..., Model]
    sampler: Mapping[str, Any]
