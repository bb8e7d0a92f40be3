"""Weights and pictures that are the same wherever they are drawn: NumPy's legacy generator never changes.

Imported by the tests and, without the rest of the repository, by the scripts that run the original packages.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

# of open_clip's CLIP: small, with the published widths of heads, and as many pixels as averages PIL's rounding out
CLIP = {
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
PROMPTS = [
    "a cat",
    "A photo of two dogs, one of them sleeping!",
    "an astronaut riding a horse, 4k, highly detailed, trending on artstation; it's 1999 & counting",
    "a very long caption of a zebra that goes on and on " * 9,
]
# heights and widths: nothing to resize, squares, oblongs of even and odd remainders, and an enlarged one
SIZES = [(224, 224), (512, 512), (300, 200), (201, 333), (96, 64)]


def weights(name: str, shape: Sequence[int]) -> np.ndarray:
    """A tensor in float16, as weights are published, by its name."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name == "logit_scale":
        return np.full((), 4.6052, np.float16)  # scores are about 100 cosines
    if name.endswith(".bias") or name.endswith("in_proj_bias"):
        return (0.1 * draw).astype(np.float16)
    if ".ln_" in f".{name}" and len(shape) == 1:
        return (1 + 0.1 * draw).astype(np.float16)
    if "embedding" in name:
        return (0.5 * draw).astype(np.float16)
    fan_in = np.prod(shape[1:]) if len(shape) > 1 and name.rpartition("_")[2] != "proj" else shape[0]
    return (draw * 1.5 / np.sqrt(fan_in)).astype(np.float16)


def pictures(height: int, width: int, count: int = len(PROMPTS)) -> np.ndarray:
    """Smooth pictures with some grain, uint8 (n, height, width, 3)."""
    source = np.random.RandomState(height * 1000 + width)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    made = []
    for _ in range(count):
        channels = []
        for _ in range(3):
            waves = [
                amplitude * np.cos(2 * np.pi * (fx * x + fy * y + phase))
                for amplitude, fx, fy, phase in source.uniform([0.2, -4, -4, 0], [1, 4, 4, 1], (4, 4))
            ]
            grain = 0.02 * source.standard_normal((height, width))
            channels.append(source.uniform(0.1, 0.9) + 0.2 * sum(waves) + grain)
        made.append(np.stack(channels, -1))
    return (np.clip(made, 0, 1) * 255).round().astype(np.uint8)
