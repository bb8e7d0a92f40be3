"""Whether weights fit a network: nothing missing, nothing over, every shape as it should be."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SHOWN = 3  # names of each kind in a message
# What may lie beside the weights of a part and says nothing about whether they fit:
# - what stock autoencoders were trained with, and the moving average beside it;
# - the norm in the files of Z-Image's authors that they do not use themselves;
# - of text encoders, the heads and towers of the model that they were cut from (T5 and Qwen's language models, CLIP's
#   images, the pooled projection of a class without it).
# Buffers that older versions stored (position_ids, inv_freq) are left out by transformers itself.
BESIDE = {
    True: re.compile(r"(first_stage_model\.|vae\.)?(loss|model_ema)\.|norm_final\.weight$"),
    False: re.compile(r"(lm_head|vision_model|visual|visual_projection|text_projection|logit_scale)(\.|$)"),
}


@dataclass(frozen=True)
class Misfit:
    """What is wrong with weights for a network. mismatched: (name, shape of the weights, shape of the network's)."""

    missing: Collection[str]
    extra: Collection[str]
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]]

    def __len__(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.mismatched)

    def __str__(self) -> str:
        shapes = [f"{name} is {_shape(given)}, not {_shape(own)}" for name, given, own in sorted(self.mismatched)]
        told = {"missing": sorted(self.missing), "not among its own": sorted(self.extra), "of another shape": shapes}
        return "; ".join(f"{what}: {_few(names)}" for what, names in told.items() if names)


def refuse_misfit(misfit: Misfit, hint: str = "") -> None:
    """ValueError unless weights fit, which lists some of what is wrong and counts the rest."""
    if misfit:
        raise ValueError(f"its weights do not fit{hint}: {misfit}")


def reported(info: Mapping[str, Any], of_diffusers: bool) -> Misfit:
    """The misfit in what a library's `from_pretrained` reports, which it makes good with random numbers."""
    return Misfit(info["missing_keys"], _not_beside(info["unexpected_keys"], of_diffusers), info["mismatched_keys"])


def compared(network: Any, state: Mapping[str, Tensor]) -> Misfit:
    """The misfit of one part's weights in diffusers' layout or in the original one, whichever fits better.

    network: of diffusers, whose own weights are not looked at (the meta device). The original layout is read as the
    class's `from_single_file` reads it, with tensors that know which of the given ones they are made of.
    """
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    traced = {name: _Traced.of(name, tensor) for name, tensor in state.items()}
    found = [_misfit(own, traced, traced)]
    convert = _converter(type(network))
    if found[0] and convert is not None:
        with suppress(KeyError, IndexError, AttributeError, RuntimeError, ValueError):  # it is not that layout at all
            found.append(_misfit(own, traced, convert(checkpoint=dict(traced), config=dict(network.config))))
    return min(found, key=len)


class _Traced(Tensor):
    """A tensor without values that knows of which tensors it was made."""

    sources: frozenset[str] = frozenset()

    @staticmethod
    def of(name: str, tensor: Tensor) -> _Traced:
        made = torch.empty(tensor.shape, device="meta").as_subclass(_Traced)
        made.sources = frozenset([name])
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        given = [one.sources for one in tree_leaves((args, kwargs)) if isinstance(one, _Traced)]
        for one in tree_leaves(made):
            if isinstance(one, _Traced):
                one.sources = frozenset().union(*given)
        return made


def _misfit(own: Mapping[str, Sequence[int]], given: Mapping[str, _Traced], named: Mapping[str, Any]) -> Misfit:
    """given: the tensors of a file. named: the same under the network's names, as far as they have one."""
    there = {name: tensor for name, tensor in named.items() if name in own and tensor is not None}
    used = frozenset().union(*(getattr(tensor, "sources", ()) for tensor in there.values()))
    shapes = {(name, tuple(t.shape), tuple(own[name])) for name, t in there.items() if t.shape != own[name]}
    return Misfit(own.keys() - there.keys(), _not_beside(given.keys() - used, True), shapes)


def _not_beside(names: Iterable[str], of_diffusers: bool) -> set[str]:
    return {name for name in names if not BESIDE[of_diffusers].match(name)}


def _converter(cls: Any) -> Any:
    """What `from_single_file` of a class makes of the original layout; None where it has nothing."""
    from diffusers.loaders import single_file_model as stock

    name = stock._get_single_file_loadable_mapping_class(cls)
    return stock.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"] if name is not None else None


def reads_single_files(cls: Any) -> bool:
    """Whether a class of diffusers has a `from_single_file` that works."""
    return _converter(cls) is not None


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"


def taken_for(state: Mapping[str, Tensor]) -> str:
    """What a file of weights is that does not fit, as far as its names tell."""
    if any("lora" in key.lower() or ".adapter_layer." in key for key in state):
        return ", which are an adapter's (LoRA)"
    kind = model_like(state)
    return f", which are like those of {kind}" if kind is not None else ""


def model_like(state: Mapping[str, Tensor]) -> str | None:
    """The model that tensors are like, by diffusers' own inference from names and shapes; None if it cannot tell."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    kind = infer_diffusers_model_type(state)
    if kind == "v1" and not any("input_blocks." in key for key in state):  # it says so of whatever it does not know
        return None
    return str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
