"""Weights of NeMo's Stable Diffusion under the names of the original code, which diffusers' converters read.

Names as in NeMo 2.1: openaimodel.py, attention.py and autoencoder.py of its multimodal collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftplus.errors import UserError
from draftplus.weights import read_nemo_part, unpacked_nemo

WRAPPED = re.compile(r"model\.(?=model\.diffusion_model\.|first_stage_model\.)")  # of what the whole was a part
# NeMo's attention has the norm before it, its feed-forward network too, and its group norms the activation behind them
ATTENTION = (
    (re.compile(r"\.attn([12])\.norm\."), r".norm\1."),
    (re.compile(r"\.ff\.net\.0\.(?=weight|bias)"), ".norm3."),
    (re.compile(r"\.ff\.net\.1\.proj\."), ".ff.net.0.proj."),
    (re.compile(r"\.ff\.net\.3\."), ".ff.net.2."),
)
RESIDUAL = (
    (re.compile(r"\.in_layers\.1\."), ".in_layers.2."),
    (re.compile(r"\.out_layers\.2\."), ".out_layers.3."),
    (re.compile(r"(^|\.)out\.1\."), r"\1out.2."),
)
ADAPTER = re.compile(
    r"(?:model\.)?model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:\d+\.)?"
    r"(transformer_blocks\..+)\.adapter_layer\.\w+\.linear_(in|out)\.weight"
)


def as_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a UNet or autoencoder, of NeMo or not, under the original code's names as far as they are NeMo's.

    Others keep their names: `torch.compile` and the models around the network leave only prefixes.
    """
    bare = {WRAPPED.sub("", name.replace("_orig_mod.", ""), count=1): tensor for name, tensor in state.items()}
    rules = [rule for rules, sign in ((ATTENTION, ".attn1.norm."), (RESIDUAL, ".in_layers.1."))
             if any(sign in name for name in bare) for rule in rules]  # fmt: skip
    return {_renamed(name, rules): tensor for name, tensor in bare.items()}


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, into in rules:
        name = pattern.sub(into, name)
    return name


def read_adapter(file: Path, config: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The LoRA in a .nemo file, of the scheme `sdlora`, under diffusers' names, and its alphas, where they are told.

    config: of the UNet. Raises UserError for a file that is damaged or holds anything but such an adapter.
    """
    with unpacked_nemo(file) as (settings, parts):
        state = read_nemo_part(file, parts[0])
    found, alphas = {}, {}
    tuning = (settings.get("peft") or {}).get("lora_tuning") or {}
    for name, tensor in state.items():
        match = ADAPTER.fullmatch(name.replace("_orig_mod.", ""))
        if match is None:
            raise UserError(
                f"{file}: '{name}' in it is not a part of an adapter (sdlora); a whole model goes to model.denoiser"
            )
        if not isinstance(getattr(config, "layers_per_block", None), int):
            raise UserError(f"{file} is an adapter of Stable Diffusion's UNet, which this model has not")
        block, number, inside, end = match.groups()
        layer = f"unet.{_block(block, int(number), config.layers_per_block)}.{inside}"
        found[f"{layer}.lora_{'A' if end == 'in' else 'B'}.weight"] = tensor
        if tuning.get("network_alpha"):  # 0 and null are a factor of 1, as without an alpha here
            alphas[f"{layer}.alpha"] = float(tuning["network_alpha"])
    return found, alphas


def _block(block: str, number: int, layers: int) -> str:
    """The attention of one of the UNet's blocks in diffusers' names. layers: in each level on the way down."""
    if block == "middle_block":
        return "mid_block.attentions.0"
    down = block == "input_blocks"
    level, layer = divmod(number - 1 if down else number, layers + 1)
    return f"{'down' if down else 'up'}_blocks.{level}.attentions.{layer}"
