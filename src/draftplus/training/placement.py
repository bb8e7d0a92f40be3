"""How the trained weights and their gradients are spread over processes.

Replicated: every process holds all trained weights, and gradients are summed once per optimizer step. Sharding of a
fully tuned denoiser will stand beside it here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from draftplus.distributed import World
from draftplus.errors import UserError


def check_mode(mode: str) -> None:
    """Raises UserError for a mode that is not available."""
    if mode == "shard":
        raise UserError("parallel.mode=shard is not available yet; use parallel.mode=replicate")


def reduce_step(parameters: Sequence[nn.Parameter], metrics: Tensor, world: World) -> Tensor:
    """Sums gradients (in place) and a vector of metrics over all processes, in one flat all-reduce.

    metrics: (m,). Returns their sums, (m,), in float64 on the CPU.
    """
    if world.size == 1:
        return metrics.cpu().double()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [metrics.to(grads[0])])
    world.sum(flat)
    offset = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[offset : offset + grad.numel()].view_as(grad)
        offset += grad.numel()
    return flat[offset:].cpu().double()
