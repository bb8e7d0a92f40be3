"""The processes of a run, `torchrun`'s or this one alone, and what lies on their devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from draftplus.distributed.meeting import Meeting
from draftplus.errors import Interrupted, UserError, notice
from draftplus.launcher import end_with_launcher

PATIENCE = 30.0  # minutes, the default of parallel.timeout
MARGIN = timedelta(minutes=1)  # by which the backend is more patient; it cannot say who is missing
MEMORY = torch.device("cpu")  # where networks lie that are not needed


@dataclass(frozen=True)
class World:
    """This process among all. rank 0 writes files and prints.

    meeting: through which it communicates; None: at once, as a process alone does.
    """

    rank: int
    size: int
    device: torch.device
    meeting: Meeting | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place. Who has it completes what it is for, also if a stop is asked for."""
        if self.size > 1:
            with self._together("sum", commits=True):
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process; small objects only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together("gathering"):
            dist.all_gather_object(values, value)
        return values

    def barrier(self, what: str = "end") -> None:
        """Waits for all processes. what: of what they do, in messages."""
        if self.size > 1:
            with self._together(what):
                dist.barrier()

    @property
    def on_machine(self) -> int:
        """The number of processes on this machine, as torchrun counts them."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The processes of a machine do what is inside one after another: it takes memory that they do not have for
        all at once. They must not communicate in it."""
        mine = int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0
        for turn in range(max(self.gather(self.on_machine))):
            if turn == mine:
                yield
            self.barrier("turn")

    def leave(self, error: BaseException | None = None) -> None:
        """Tells the others not to wait for this process, which stops, or fails with an error."""
        if self.meeting is not None:
            self.meeting.leave(error)

    @contextmanager
    def _together(self, what: str, commits: bool = False) -> Iterator[None]:
        with self.meeting.of_all(what, commits) if self.meeting is not None else nullcontext():
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # NCCL returns before it has communicated


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


@contextmanager
def world(device: str = "auto", patience: float = PATIENCE) -> Iterator[World]:
    """Joins the processes that `torchrun` started (NCCL on GPUs, gloo elsewhere), or stands alone.

    patience: minutes without progress after which a process that others wait for ends them all with Stalled.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    end_with_launcher()
    if size == 1 or dist.is_initialized():
        yield World(rank, size, chosen)
        return
    longest = timedelta(minutes=patience) + MARGIN

    def connect() -> Store:
        return next(iter(rendezvous("env://", timeout=longest)))[0]

    meeting = Meeting(connect, rank, size, 60 * patience)
    try:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=size, timeout=longest)
        try:
            yield World(rank, size, chosen, meeting)
        except Interrupted:
            meeting.leave()
            raise
        except BaseException as error:
            meeting.leave(error)
            raise
        finally:
            dist.destroy_process_group()
    finally:
        meeting.close()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """What was made on the CPU, on a device. On CUDA the host does not wait for it, as it would for a copy of memory
    that is not pinned."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n,) numbers that are needed in every pass, which go to the device once. Not to be changed in place."""
    return torch.tensor(values, dtype=dtype, device=device)


class Offload:
    """What `model.offload` does: networks are off the device while a model denoises, and come back when they are used.

    Moving is exact, so results are the same bit for bit. wanted: on a CPU without effect, which the user is told.
    """

    def __init__(self, device: torch.device, wanted: bool) -> None:
        self.device, self.on = device, wanted and device.type != MEMORY.type
        if wanted and not self.on:
            notice("model.offload=true has no effect on a CPU")
        self._here: WeakSet[nn.Module] = WeakSet()

    def use(self, *networks: nn.Module) -> None:
        """Networks that are on the device from now on, until `idle`."""
        for network in networks if self.on else ():
            if network not in self._here:
                move(network, self.device)
                self._here.add(network)

    def idle(self) -> None:
        """Sends away all that were used; not between passes with gradient and their backward pass, which uses them."""
        while self._here:
            move(self._here.pop(), MEMORY)


def move(network: nn.Module, device: torch.device) -> None:
    network.to(device)
