"""Frozen weights in eight or four bits, by the back ends of diffusers and transformers: torchao and bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftplus.config import ModelConfig
from draftplus.errors import UserError

BACK_ENDS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
UNCHANGED = ("vae",)  # parts that no back end makes smaller


def refuse_impossible(config: ModelConfig, device: torch.device, single_file: bool) -> None:
    """UserError for a quantisation that this model, machine or environment does not have; before weights are loaded.

    single_file: whether `model.path` is one file of a whole model. On the meta device, where nothing is quantised, only
    the model is looked at.
    """
    kind = config.quantize
    if kind is None:
        return
    where = f"model.quantize is {kind}"
    if single_file:
        raise UserError(
            f"{where}, but model.path '{config.path}' is a single file, whose text encoders cannot be quantised; give "
            "the model as a directory in the diffusers layout or a hub id, or set model.quantize=null"
        )
    if device.type == "meta":
        return
    if kind == "nf4" and device.type != "cuda":
        raise UserError(
            f"{where}, which diffusers makes on a CUDA device alone, but the device is {device.type}; use "
            "model.quantize=int8 or device=cuda"
        )
    if find_spec(BACK_ENDS[kind]) is None:
        raise UserError(f"{where}, which needs {BACK_ENDS[kind]}; run: pip install 'draftplus[quantize]'")


def arguments(config: ModelConfig, name: str, of_diffusers: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Keywords of `from_pretrained` by which a part is quantised as it is read.

    name: of the part. dtype: of the layers that stay as they are, and of what the quantised ones compute.
    """
    kind = config.quantize
    if kind is None or name in UNCHANGED:
        return {}
    import diffusers
    import transformers

    library: Any = diffusers if of_diffusers else transformers
    if kind == "nf4":
        told = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return {"quantization_config": library.BitsAndBytesConfig(load_in_4bit=True, **told)}
    from torchao import quantization

    weights = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}
    return {"quantization_config": library.TorchAoConfig(weights[kind]())}


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is one that a back end has made smaller."""
    return isinstance(weight, Imitation) or type(weight).__module__.partition(".")[0] in BACK_ENDS.values()


class Imitation(nn.Parameter):
    """What stands for a quantised weight where no weights are read: of its shape, and of its size in bytes."""


class FrozenLinear(nn.Linear):
    """A layer with a quantised weight through which a gradient passes, and which is not trained itself.

    It computes what it did before, bit for bit. But torchao's own backward pass would keep the whole weight in full
    precision, once for each call, which is more than was saved; here it is made anew from the quantised one.
    """

    def forward(self, input: Tensor) -> Tensor:
        made: Tensor = _Frozen.apply(input, self)
        return made


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight: Any = ctx.layer.weight
        return grad @ weight.dequantize(grad.dtype), None


def keep_small(network: nn.Module) -> None:
    """Lets a network's backward pass keep no quantised weight in full precision. bitsandbytes does so by itself."""
    for module in network.modules():
        if type(module) is nn.Linear and is_quantised(module.weight):
            module.__class__ = FrozenLinear
