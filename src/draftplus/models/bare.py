"""Networks without weights, on torch's meta device, for planning: made of a model's configurations alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from draftplus.models.bare_quantized import imitate
from draftplus.types import Conditioning


def is_bare(device: torch.device) -> bool:
    """Whether a model for this device is made without weights; none are fetched or read."""
    return device.type == "meta"


def network(cls: Any, folder: Path, dtype: torch.dtype, name: str, quantize: str | None) -> Any:
    """A network of the configuration in a folder, without weights, in the precisions that loading it would give.

    name: of the part of the pipeline. quantize: how it would be quantised.
    """
    of_diffusers = cls.__module__.startswith("diffusers.")
    with torch.device("meta"), _Unfilled():
        if of_diffusers:
            made = cls.from_config(cls.load_config(folder))
        else:
            made = cls(cls.config_class.from_pretrained(folder))
    made.to(dtype)
    kept = getattr(made, "_keep_in_fp32_modules", None) or ()
    if dtype == torch.float16 or of_diffusers:
        for key, parameter in made.named_parameters():
            if any(re.search(rf"(^|\.){re.escape(one)}(\.|$)", key) for one in kept):
                parameter.data = parameter.data.float()
    imitate(made, name, quantize, of_diffusers)
    return made if of_diffusers else Encoder(made)


class _Unfilled(TorchDispatchMode):
    """Inside, nothing is drawn for tensors without content, for which torch would take milliseconds each."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_DRAWS = {torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default}


class Encoder(nn.Module):
    """A text encoder without weights, which gives tensors of zeros, of the shapes that it would give.

    network: the true one, on the meta device. Masks are not read, for they have no say in shapes.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.config = network.config

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where tokens are to be, which have content."""
        return torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Any:
        device, ids = input_ids.device, input_ids.to("meta")
        return _mapped(self.network(ids, **settings), lambda one: one.new_zeros((), device=device).expand(one.shape))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The outputs of a network, in their own containers, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        made = type(value)()
        for key, one in value.items():
            made[key] = _mapped(one, change)
        return made
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(one, change) for one in value)
    return None


def without_content(embed: Callable[[Any, str | None], Conditioning]) -> Callable[[Any, str | None], Conditioning]:
    """What embeds a prompt, giving tensors on the meta device."""

    def embedded(pipe: Any, prompt: str | None) -> Conditioning:
        given = embed(pipe, prompt)
        mask = None if given.mask is None else given.mask.to("meta")
        return Conditioning(given.hidden.to("meta"), mask, {key: one.to("meta") for key, one in given.extras.items()})

    return embedded
