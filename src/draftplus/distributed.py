"""The processes of a run: `torchrun`'s, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from draftplus.errors import UserError
from draftplus.launcher import end_with_launcher

PATIENCE = timedelta(hours=2)  # for a process that evaluates while others wait


@dataclass(frozen=True)
class World:
    """This process among all. rank 0 writes files and prints."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process; small objects only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a configuration's `device`; auto: this process's GPU, else Apple's, else the CPU.

    Raises UserError for a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" makes tensors without content
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device '{name}' is not available on this machine; try device=auto or device=cpu") from None
    return device


def is_main_process() -> bool:
    """Whether this process is the one that prints, also before and after it joins the others."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Joins the processes that `torchrun` started (NCCL on GPUs, gloo elsewhere), or stands alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joins = size > 1 and not dist.is_initialized()
    end_with_launcher()
    if joins:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, chosen)
    finally:
        if joins:
            dist.destroy_process_group()
