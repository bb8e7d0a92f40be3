"""Dropout inside a frozen reward network, against overfitting to it; one of two remedies that DRaFT's authors tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from draftplus import rng
from draftplus.distributed import sent
from draftplus.errors import UserError


def check_rate(reward: str, rate: float) -> None:
    """UserError for a dropout rate of reward `reward` that is not in [0, 1)."""
    if not 0 <= rate < 1:
        raise UserError(
            f"reward '{reward}': args.dropout is {rate!r}; it must be at least 0 and less than 1, such as 0.1."
        )


class Dropout:
    """Dropout on the outputs of each attention and each MLP block, before they join the residual stream.

    These are the places of Vaswani et al. 2017 (section 5.4). It acts only inside `active`. Each image's noise is
    addressed (`rng.samples`), so that micro-batches, ranks and resuming do not change it.
    """

    def __init__(self, blocks: Iterable[Any], rate: float) -> None:
        """blocks: transformer layers with `self_attn` and `mlp`, whose outputs are (b, tokens, width)."""
        self.rate = rate
        self._generators: list[torch.Generator] = []
        for block in blocks:
            for part in (block.self_attn, block.mlp):
                part.register_forward_hook(self._hook)

    @contextmanager
    def active(self, images: int) -> Iterator[None]:
        """Inside, a forward pass of this many images is noisy, with new noise each time."""
        self._generators = rng.generators("dropout", images)
        try:
            yield
        finally:
            self._generators = []

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._generators:
            return output
        if isinstance(output, tuple):  # attention returns its weights too
            return self._drop(output[0]), *output[1:]
        return self._drop(output)

    def _drop(self, hidden: Tensor) -> Tensor:
        kept = [torch.empty(hidden.shape[1:]).bernoulli_(1 - self.rate, generator=g) for g in self._generators]
        return hidden * sent((torch.stack(kept) / (1 - self.rate)).to(hidden.dtype), hidden.device)
