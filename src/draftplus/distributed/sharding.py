"""Networks of which each process holds a part (FSDP2), and tensors of which it does.

A sharded parameter is a `DTensor`. Whatever is computed of one alone, as an optimizer does, is computed on the parts;
what looks at a process's own part takes it from `own`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from draftplus.distributed import World
from draftplus.errors import UserError

if TYPE_CHECKING:  # these take a second to import, and most processes shard nothing
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def make_mesh(here: World, within: int | None) -> DeviceMesh:
    """How the processes share weights: each `within` of them, the next in rank, hold a copy together.

    within: None: those of one machine, as torchrun counts them.

    Raises UserError where they cannot be divided so.
    """
    size = within or (here.on_machine if here.size % here.on_machine == 0 else here.size)
    if here.size % size:
        raise UserError(
            f"parallel.shard_size is {size}, which does not divide the {here.size} processes; use one of "
            f"{', '.join(str(n) for n in range(1, here.size + 1) if here.size % n == 0)}"
        )
    from torch.distributed.device_mesh import init_device_mesh

    if size == here.size:
        return init_device_mesh(here.device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(here.device.type, (here.size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(
    network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, device: torch.device,
    kept: Collection[nn.Parameter] = (),
) -> None:  # fmt: skip
    """Leaves this process its part of each weight, on its device. A block is gathered while it computes.

    blocks: of the network, an outer one before those inside it. kept: parameters that every process has whole.
    Gradients are summed over the processes, not averaged.
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for module in (*reversed(blocks), network):
        # what was gathered is let go after a pass without gradient too, the network's own weights included
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(kept))
    for part in _sharded(network):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def shard_frozen(networks: Sequence[nn.Module], above: int | None, mesh: DeviceMesh, device: torch.device) -> None:
    """The same of networks that are not trained, by their layers, where together they are `large`."""
    for network in networks if large(networks, above) else ():
        if not _is_sharded(network):  # as one that two rewards have may be
            shard(network.requires_grad_(False), layers(network), mesh, device)


def large(networks: Sequence[nn.Module], above: int | None) -> bool:
    """Whether the weights of networks take more than so many bytes; None: never."""
    return above is not None and sum(one.nbytes for network in networks for one in network.parameters()) > above


def layers(network: nn.Module) -> list[nn.Module]:
    """The entries of a network's lists of modules, but of lists in these: blocks of one of which none are known."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(network, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [child] if any(True for _ in child.parameters()) else []
        else:
            found += layers(child)
    return found


def reduce_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward passes sum gradients over the processes, or keep them, whole, for one that will."""
    if _is_sharded(network):
        network.set_requires_gradient_sync(wanted)


def plain_class(network: nn.Module) -> type:
    """The class that a network had before it was sharded, which gives it one of its own."""
    return next(cls for cls in type(network).__mro__ if not issubclass(cls, _known("fsdp", "FSDPModule")))


@contextmanager
def gathered_as(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the weights of a sharded network that are not trained are gathered in this precision, and their parts
    keep their own. Backward passes of what is computed inside belong inside too."""
    try:
        _gather_as(network, dtype)
        yield
    finally:
        _gather_as(network, None)


def _gather_as(network: nn.Module, dtype: torch.dtype | None) -> None:
    # FSDP2 fixes the precision for good when a network is sharded; this is all that it remembers of it
    for module in _sharded(network):
        module.reshard()
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                if parameter.param_dtype != dtype and not parameter.sharded_param.requires_grad:
                    parameter.param_dtype, parameter.all_gather_outputs = dtype, []
                    if hasattr(parameter, "_unsharded_param"):
                        del parameter._unsharded_param


def _sharded(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if _is_sharded(module)]


def _is_sharded(network: nn.Module) -> TypeGuard[FSDPModule]:
    return isinstance(network, _known("fsdp", "FSDPModule"))


def is_part(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process has a part of it."""
    return isinstance(tensor, _known("tensor", "DTensor"))


def _known(module: str, name: str) -> Any:
    """A class of torch.distributed; where nobody has imported it, the empty tuple, of which nothing is an instance."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, ())


def own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, not a copy of it; all of one that is not sharded."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process calls it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor as a parameter of its shape is sharded, on its device: a `DTensor` where that is one."""
    if not is_part(parameter) or is_part(tensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(parameter.device)
    return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)
