"""How the trained weights and their gradients are spread over processes.

Replicated: every process holds all trained weights, and gradients are summed once per optimizer step. What another
placement would do otherwise stands in the methods of `Placement`; all of them are called by every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.training.optim import Parameters, gradient_norm
from draftplus.types import Model


class Placement(Protocol):
    """Where weights lie. Every process calls each method, in the same order."""

    def place(self, model: Model) -> None:
        """Spreads a loaded model; before the optimizer is made of its parameters."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch. last: whether gradients are complete after it."""
        ...

    def reduce(self, parameters: Sequence[nn.Parameter], metrics: Tensor) -> Tensor:
        """Sums gradients (in place) and a vector of metrics, (m,), over all processes.

        Returns the sums of the metrics, in float64 on the CPU.
        """
        ...

    def clip(self, parameters: Parameters, limit: float | None) -> float:
        """The Euclidean norm over all gradients, which are then scaled down to `limit` if they exceed it."""
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The whole tensors, where they are to be written: on the main process; None on the others."""
        ...

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a parameter's tensor, or of one of its shape."""
        ...


@dataclass(frozen=True)
class Replicated:
    """All weights on every process."""

    here: World

    def place(self, model: Model) -> None:
        pass

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, parameters: Sequence[nn.Parameter], metrics: Tensor) -> Tensor:
        """In one flat all-reduce."""
        if self.here.size == 1:
            return metrics.cpu().double()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads] + [metrics.to(grads[0])])
        self.here.sum(flat)
        offset = 0
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = flat[offset : offset + grad.numel()].view_as(grad)
            offset += grad.numel()
        return flat[offset:].cpu().double()

    def clip(self, parameters: Parameters, limit: float | None) -> float:
        return gradient_norm(parameters, limit)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return dict(tensors) if self.here.is_main else None

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        return whole


def make_placement(mode: str, here: World) -> Placement:
    """The placement of a configuration's `parallel.mode`.

    Raises UserError for a mode that is not available.
    """
    if mode == "shard":
        raise UserError("parallel.mode=shard is not available yet; use parallel.mode=replicate")
    return Replicated(here)
