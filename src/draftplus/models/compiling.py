"""A denoiser whose repeated blocks are compiled, and convolutions that read channels last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.distributed.sharding import is_part, plain_class
from draftplus.errors import UserError, first_line, is_out_of_memory
from draftplus.models.quantize import is_quantised

BACKEND = "inductor"
OFF = "or set train.compile=false"
# Graphs of one block: with and without gradient, with adapters on, off and folded, in two precisions, for each shape
# of a U-Net's levels and two sizes of batches. All blocks count together, and torch allows 8 unless it is told.
GRAPHS = 256


def compile_blocks(networks: Sequence[Any], vae: nn.Module, device: torch.device) -> None:
    """Has the blocks of denoisers compiled when they are first called, for each shape of their inputs, and puts the
    convolutions of U-Nets and of the autoencoder's decoder in channels-last memory.

    Names of modules and weights stay as they are. Adapters that are switched, folded or widened later act inside
    compiled blocks: each state has a graph of its own, and weights are inputs of it. What gathers the weights of a
    block that is divided over processes stays outside.

    Raises UserError where nothing can be compiled for this device.
    """
    refuse_without_compiler(device)
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * GRAPHS)
    for network in networks:
        for block in blocks(network):
            # a graph that is whole or an error: one that breaks would be slow, and nobody would know
            block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=BACKEND)
        if plain_class(network).__name__.startswith("UNet"):
            channels_last(network)
            network.register_forward_pre_hook(_latents_channels_last)
    channels_last(vae.get_submodule("decoder"))


def blocks(network: Any) -> list[nn.Module]:
    """The repeated blocks of a denoiser of diffusers, which names them for this purpose or at least for sharding."""
    names = network._repeated_blocks or network._no_split_modules
    return [module for module in network.modules() if plain_class(module).__name__ in names]


def channels_last(network: nn.Module) -> None:
    """Puts the frozen weights of convolutions in channels-last memory, in which GPUs compute them.

    Trained ones keep their layout, and so do their optimizer's moments and the files that are written of them: it is
    enough that what they are multiplied with has the other. So do those of which a process has a part.
    """
    if any(parameter.dim() == 5 for parameter in network.parameters()):
        return  # of videos, whose few convolutions of pictures would be alone with it
    for parameter in network.parameters():
        fixed = parameter.requires_grad or is_part(parameter) or is_quantised(parameter)
        if parameter.dim() == 4 and not fixed:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _latents_channels_last(network: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    latents, *rest = given
    return latents.contiguous(memory_format=torch.channels_last), *rest


def refuse_without_compiler(device: torch.device) -> None:
    """UserError where not even an addition can be compiled for a device: it says what to install."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:  # those of three compilers have no base class in common
        if is_out_of_memory(error):
            raise
        needed = {"cuda": "triton (pip install triton) and a C compiler such as gcc, with Python's headers"}
        tools = needed.get(device.type, "a C++ compiler such as g++, with Python's headers")
        raise UserError(
            f"train.compile is true, but nothing can be compiled for device '{device}': "
            f"{first_line(error)[:200]}. Install {tools}, {OFF}"
        ) from error
