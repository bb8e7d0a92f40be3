"""Weights of NeMo's Stable Diffusion under the names of the original code, which diffusers' converters read.

Names as in NeMo 2.1: openaimodel.py, attention.py and autoencoder.py of its multimodal collection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

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
