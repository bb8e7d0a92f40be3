"""Networks without weights whose linear layers take the memory that `model.quantize` leaves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftplus.models.quantize import UNCHANGED, Imitation

BLOCK = 64  # weights of nf4 that share a scale
SCALE = 4  # bytes of a scale, of every back end
CODE = 16 * SCALE  # the numbers that four bits stand for, which each layer has


def _by_row(beside: int) -> Callable[[int, int], int]:
    return lambda rows, columns: rows * (columns + beside)


def _nf4(rows: int, columns: int) -> int:
    count = rows * columns
    return -(-count // 2) + SCALE * -(-count // BLOCK) + CODE


# kind -> the bytes of a weight of so many rows and columns; int8 has a zero point of one byte beside each row's scale
BYTES = {"int8": _by_row(SCALE + 1), "fp8": _by_row(SCALE), "nf4": _nf4}


def imitate(network: Any, name: str, kind: str | None, of_diffusers: bool) -> None:
    """Gives the layers that would be quantised weights of that size. name: of the part of the pipeline."""
    if kind is None or name in UNCHANGED:
        return
    for module in list(_quantised(network, of_diffusers)):
        rows, columns = module.weight.shape
        dtype = module.weight.dtype
        room = torch.empty(-(-BYTES[kind](rows, columns) // dtype.itemsize), dtype=dtype, device="meta")
        module.weight = Imitation(room[:1].expand(rows, columns), requires_grad=False)
        module.__class__ = Small


def _quantised(network: Any, of_diffusers: bool) -> Iterator[nn.Linear]:
    """The layers that the library's quantisers change."""
    wide = list(network._keep_in_fp32_modules or ())
    linear = [(name, one) for name, one in network.named_modules() if type(one) is nn.Linear]
    if of_diffusers:
        yield from (one for name, one in linear if not any(f"{key}." in f"{name}.weight" for key in wide))
        return
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = [*get_keys_to_not_convert(network), *wide]
    yield from (one for name, one in linear if should_convert_module(f"{name}.weight", left))


class Small(nn.Linear):
    """A layer whose weight stands for a quantised one, and is made in full for as long as a pass through it lasts."""

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = _Passed.apply(input, self)
        return made


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, x.new_empty(layer.weight.shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.layer.weight.shape), None
