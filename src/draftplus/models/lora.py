"""Low-rank adapters on a denoiser (Hu et al. 2021, arXiv 2106.09685) through peft."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from draftplus import rng
from draftplus.config import LoraConfig
from draftplus.distributed.sharding import is_part
from draftplus.errors import UserError, first_line
from draftplus.models.lora_files import LoraFile
from draftplus.models.quantize import is_quantised

ADAPTER = "default"
_ORIGINALS: WeakKeyDictionary[LoraLayer, Tensor] = WeakKeyDictionary()  # the weights of layers while they are folded


def add_lora(denoiser: nn.Module, config: LoraConfig, seed: int, attention: Sequence[str]) -> None:
    """Adds adapters in at least float32, A drawn from `seed` and B zero, so that the prediction is unchanged at first.

    attention: the layers that `config.targets` calls "attention", by the ends of their names.

    Raises UserError if the targets name no module of the denoiser.
    """
    targets = _targets(denoiser, config.targets, attention)
    peft = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.address(seed, "lora"))
        denoiser.add_adapter(peft, adapter_name=ADAPTER)  # type: ignore[operator]
    _at_least_float32(denoiser)


def _at_least_float32(denoiser: nn.Module) -> None:
    for parameter in trained(denoiser).values():
        parameter.data = parameter.data.to(torch.promote_types(torch.float32, parameter.dtype))


def _targets(denoiser: nn.Module, targets: object, attention: Sequence[str]) -> list[str]:
    """The whole names of the layers to adapt: by the end of a name, peft would also find what is no layer."""
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    convolution = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Conv2d)]

    def ending(ends: Sequence[str]) -> list[str]:
        return [name for name in linear + convolution if any(f".{name}".endswith(f".{end}") for end in ends)]

    if isinstance(targets, str):
        groups = {
            "attention": ending(attention),
            "linear": linear,
            "convolution": convolution,
            "all": linear + convolution,
        }
        if targets not in groups:
            raise UserError(
                f"model.lora.targets is '{targets}'; choose one of {', '.join(groups)}, or give a list of module names"
            )
        return groups[targets]
    if not isinstance(targets, list) or not targets:
        raise UserError(f"model.lora.targets is {targets!r}; give a name or a list of module names")
    absent = [target for target in targets if not ending([target])]
    if absent:
        raise UserError(
            f"model.lora.targets: no layer of the denoiser is named '{absent[0]}'; the names of its attention "
            f"layers end in {', '.join(attention)}"
        )
    return ending(targets)


def layers(denoiser: nn.Module) -> list[LoraLayer]:
    """The adapted layers."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def trained(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


@contextmanager
def adapters_off(*networks: nn.Module) -> Iterator[None]:
    """Inside, the networks are the frozen ones, also where their adapters are folded into the weights."""
    adapted = [layer for network in networks for layer in layers(network)]
    merged = [(layer, _base(layer).weight.data) for layer in adapted if layer in _ORIGINALS]
    for layer, _ in merged:
        _base(layer).weight.data = _ORIGINALS[layer]
    try:
        with _enabled(adapted, False):
            yield
    finally:
        for layer, weight in merged:
            _base(layer).weight.data = weight


@contextmanager
def folded(denoiser: nn.Module) -> Iterator[None]:
    """Inside, float32 (or float64) weights hold W + scale * B A and the adapters are off, for faster inference.

    Precomputed tensors are swapped in and the originals back, so the frozen weights stay bit-identical; layers in half
    precision or quantised, where a young adapter would be rounded away, keep their adapters on, and so do sharded ones.
    """
    fitting = [layer for layer in layers(denoiser) if _is_wide(_base(layer).weight)]
    originals = [_base(layer).weight.data for layer in fitting]
    with torch.no_grad():
        merged = [
            original + layer.get_delta_weight(ADAPTER).to(original)
            for layer, original in zip(fitting, originals, strict=True)
        ]
    try:
        for layer, weight, original in zip(fitting, merged, originals, strict=True):
            _base(layer).weight.data, _ORIGINALS[layer] = weight, original
        with _enabled(fitting, False):
            yield
    finally:
        for layer, original in zip(fitting, originals, strict=True):
            _base(layer).weight.data = original
            _ORIGINALS.pop(layer, None)


def _is_wide(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.float64) and not is_quantised(weight) and not is_part(weight)


def merge(network: Any) -> None:
    """Adds the adapters to the weights, in at least float32 and rounded then; afterwards the layers are plain ones.

    Raises UserError where these are quantised.
    """
    if any(is_quantised(_base(layer).weight) for layer in layers(network)):
        raise UserError("adapters cannot be merged into quantised weights; load the model with model.quantize=null")
    with torch.no_grad():
        for layer in layers(network):
            weight, delta = _base(layer).weight, layer.get_delta_weight(ADAPTER)
            weight.copy_(weight.to(torch.promote_types(torch.float32, weight.dtype)) + delta.to(weight.device))
    _detach(network)


def _base(layer: LoraLayer) -> nn.Linear | nn.Conv2d:
    return layer.get_base_layer()


@contextmanager
def _enabled(chosen: list[LoraLayer], on: bool) -> Iterator[None]:
    # peft's own enable_adapters() also switches requires_grad, which must not change under a live graph
    before = [layer._disable_adapters for layer in chosen]
    for layer in chosen:
        layer._disable_adapters = not on
    try:
        yield
    finally:
        for layer, was in zip(chosen, before, strict=True):
            layer._disable_adapters = was


def export(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapters as diffusers names them, contiguous on the CPU.

    alpha / rank is multiplied into B, so that the file means the same in every loader, whether or not it reads alpha.
    """
    state: dict[str, Tensor] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, LoraLayer):
            scale = module.lora_alpha[ADAPTER] / module.r[ADAPTER]
            state[f"{name}.lora_A.weight"] = module.lora_A[ADAPTER].weight.detach().cpu().contiguous().clone()
            state[f"{name}.lora_B.weight"] = (module.lora_B[ADAPTER].weight.detach() * scale).cpu().contiguous()
    return state


def attach(networks: Mapping[str, Any], adapter: LoraFile) -> None:
    """Gives networks the adapters of a LoRA file, of any rank and targets, in place of those they have.

    networks: by their names in the stock pipeline. What stock diffusers loads and scales, is loaded and scaled so.

    Raises UserError if the file, or a part of it, is not a LoRA of these networks.
    """
    file, names = adapter.file, tuple(f"{name}." for name in networks)
    if not any(name.startswith(names) for name in adapter.state):
        raise UserError(f"{file} contains no adapter of the denoiser (its tensor names would start with '{names[0]}')")
    stray = next((name for name in adapter.state if not name.startswith(names)), None)
    if stray is not None:
        raise UserError(
            f"{file}: the adapter does not fit this model: '{stray}' is of none of its networks, {', '.join(networks)}"
        )
    for name, network in networks.items():
        _detach(network)
        try:
            half = adapter.half(name, network)
            if half:
                with _silent(logging.getLogger("diffusers")):  # it prints all names of an adapter that does not fit
                    _load_as_stock(network, name, half, adapter)
        except Exception as error:  # those of three libraries have no base class in common
            raise UserError(f"{file}: the adapter does not fit this model: {first_line(error)[:200]}") from None
        if half:
            _settle(network, half, adapter.alphas_of(name, network), adapter)


def _detach(network: Any) -> None:
    if layers(network):
        recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config
        network._hf_peft_config_loaded = False


def _load_as_stock(network: Any, name: str, half: Mapping[str, Tensor], adapter: LoraFile) -> None:
    state = {f"{name}.{key}": tensor for key, tensor in half.items()}
    told = {"network_alphas": adapter.alphas, "metadata": adapter.metadata, "adapter_name": ADAPTER}
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(state, prefix=name, **told)
    else:
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, text_encoder=network, prefix=name, **told)


def _settle(network: nn.Module, half: Mapping[str, Tensor], alphas: Mapping[str, float], adapter: LoraFile) -> None:
    """Refuses what stock diffusers only warns of or says nothing about, and multiplies the scales into B."""
    stray = set(half) ^ set(export(network))
    if stray:
        raise UserError(f"{adapter.file}: the adapter does not fit this model: '{min(stray)}' is in only one of them")
    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        scale, rank = layer.scaling[ADAPTER], layer.r[ADAPTER]
        meant = alphas.get(name, rank) / rank
        if adapter.metadata is None and abs(scale - meant) > 1e-6 * abs(meant):
            raise UserError(
                f"{adapter.file}: the alpha of '{name}' differs from that of other layers, and stock diffusers ignores "
                f"it: it scales by {scale:g} where the file says {meant:g}; multiply the alphas into the weights"
            )
        # peft rounded them to the precision of the layers that they adapt
        for part, factor in ((layer.lora_A, 1.0), (layer.lora_B, scale)):
            weight = part[ADAPTER].weight
            source = half[f"{name}.lora_{'A' if part is layer.lora_A else 'B'}.weight"]
            weight.data = factor * source.to(weight.device, torch.promote_types(torch.float32, weight.dtype))
        layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, 1.0


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_scale(network: nn.Module, scale: float) -> None:
    """Multiplies the adapters' effect: 0 is the base model, 1 the tuned one."""
    for layer in layers(network):
        layer.scaling[ADAPTER] = scale * layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]
