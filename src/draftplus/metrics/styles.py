"""Whether the embedded model still draws in its styles, which LPIPS does not see.

A cat drawn in one style over and over, on other backgrounds and in other places, is as far apart by LPIPS as cats of
all styles. So the styles are asked for by name: the embedded CLIP compares each image with the captions "a cat in flat
style", one for each style.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

STYLES = ("noto", "blob", "twemoji", "3d", "flat", "emojione", "firefox")  # assets/README.md

_STYLE = re.compile(rf" in ({'|'.join(STYLES)}) style\b")
_BACKGROUND = re.compile(r" on an? \w+ background\b")


def style_captions(prompt: str) -> list[str]:
    """The prompt in each of the styles, in the embedded model's words; a style that it names already is replaced."""
    plain = _STYLE.sub("", prompt)
    background = _BACKGROUND.search(plain)
    at = background.start() if background else len(plain)
    return [f"{plain[:at]} in {style} style{plain[at:]}" for style in STYLES]


def style_entropy(probabilities: Tensor) -> Tensor:
    """-Σ p ln p of distributions over styles, in nats: (…, s) -> (…). exp of it is the effective number of styles."""
    return torch.special.entr(probabilities).sum(-1)
