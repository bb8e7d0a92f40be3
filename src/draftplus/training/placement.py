"""How the trained weights and their gradients are spread over processes.

Replicated: every process holds all weights, and gradients are summed once per optimizer step. Sharded: each holds a
part of the denoiser. All methods of a `Placement` are called by every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from draftplus.config.schema import ParallelConfig
from draftplus.config.sizes import shard_frozen_above
from draftplus.distributed import MEMORY, World
from draftplus.distributed.sharding import is_part, make_mesh, reduce_gradients, shard, shard_frozen, whole
from draftplus.errors import UserError, notice
from draftplus.types import Model, Reward

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Placement(Protocol):
    """Where weights lie. Every process calls each method, in the same order."""

    @property
    def loads_on(self) -> torch.device | None:
        """Where the denoiser is loaded, before `place`; None: on the device."""
        ...

    def place(self, model: Model) -> None:
        """Spreads a loaded model; before the optimizer is made of its parameters."""
        ...

    def loading(self) -> AbstractContextManager[None]:
        """Around the loading and spreading of what may not have room in memory for all processes at once."""
        ...

    def place_reward(self, reward: Reward) -> None:
        """Spreads what takes much room of a loaded reward; after the model."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch. last: whether gradients are complete after it."""
        ...

    def reduce(self, parameters: Sequence[nn.Parameter], metrics: Tensor) -> Tensor:
        """Sums gradients (in place) and a vector of metrics, (m,), over all processes.

        Returns the sums of the metrics, in float64 on the CPU.
        """
        ...

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The whole tensors, where they are to be written: on the main process; None on the others."""
        ...


@dataclass(frozen=True)
class Replicated:
    """All weights on every process."""

    here: World

    @property
    def loads_on(self) -> None:
        return None

    def place(self, model: Model) -> None:
        pass

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def place_reward(self, reward: Reward) -> None:
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

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        return dict(tensors) if self.here.is_main else None


@dataclass
class Sharded:
    """Each process holds a part of every weight of the denoiser, and of the frozen copy of one that is fully tuned,
    with its gradient and what the optimizer remembers of it (FSDP2, `distributed.sharding`). Adapters are small, and
    whole on every process. within: `parallel.shard_size`. frozen_above: bytes of weights above which the decoder, and
    what a reward says is divisible, is in parts, too; None: never.
    """

    here: World
    within: int | None
    frozen_above: int | None = None
    networks: list[nn.Module] = field(default_factory=list)

    @property
    def loads_on(self) -> torch.device:
        return MEMORY  # where a denoiser has room that no device has room for

    @cached_property
    def mesh(self) -> DeviceMesh:
        return make_mesh(self.here, self.within)

    def place(self, model: Model) -> None:
        mesh = self.mesh  # which all make together
        with self.loading():  # a family's denoiser is read when it is asked for, and is whole until it is divided
            tuned = model.tuned
            kept = tuned.trainable().values() if tuned.has_adapters() else ()
            self.networks = tuned.networks()
            for network in self.networks:
                shard(network, tuned.blocks(network), mesh, self.here.device, kept)
            shard_frozen([model.decoder], self.frozen_above, mesh, self.here.device)

    def loading(self) -> AbstractContextManager[None]:
        return self.here.in_turn()

    def place_reward(self, reward: Reward) -> None:
        shard_frozen(getattr(reward, "divisible", ()), self.frozen_above, self.mesh, self.here.device)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        for network in self.networks:
            reduce_gradients(network, last)
        yield

    def reduce(self, parameters: Sequence[nn.Parameter], metrics: Tensor) -> Tensor:
        """Gradients of parts are summed by the backward pass itself."""
        replicated = Replicated(self.here)
        if not any(map(is_part, parameters)):
            return replicated.reduce(parameters, metrics)
        for parameter in parameters:
            if parameter.grad is None:  # of a weight that nothing depends on
                parameter.grad = torch.zeros_like(parameter)
        return self.here.sum(metrics).cpu().double()

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        gathered = {}
        for name, tensor in tensors.items():
            all_of_it = whole(tensor)
            if self.here.is_main:  # on the CPU, where there is room for all of them; what fills up a last part is left
                gathered[name] = all_of_it.to(MEMORY, copy=True)
        return gathered if self.here.is_main else None


def make_placement(config: ParallelConfig, here: World) -> Placement:
    """The placement of a configuration's `parallel`.

    Raises UserError for a size of shards where there are none, and for what is no size.
    """
    above = shard_frozen_above(config)
    if config.mode != "shard":
        if config.shard_size is not None:
            raise UserError(
                f"parallel.shard_size is {config.shard_size}, but parallel.mode is {config.mode}; set "
                "parallel.mode=shard, or parallel.shard_size=null"
            )
        return Replicated(here)
    if here.size == 1:
        notice("parallel.mode=shard has no effect on one process; start several, such as torchrun --nproc-per-node=2")
        return Replicated(here)
    if here.meeting is not None:
        here.meeting.inseparable = True
    return Sharded(here, config.shard_size, above)
