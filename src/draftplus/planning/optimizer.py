"""What an optimizer's state takes where it cannot be made without weights: that of bitsandbytes, in 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # a parameter with fewer has moments in float32
CODES = 2 * 256 * 4  # bytes of the numbers that 8 bits stand for, of both moments, once for all parameters


def eight_bit_moments(parameters: Iterable[Tensor]) -> int:
    """Bytes of AdamW's two moments, in 8 bits each, with a float32 scale for each block."""
    sizes = [parameter.numel() for parameter in parameters]
    large = [size for size in sizes if size >= SMALLEST]
    small = sum(sizes) - sum(large)
    return 2 * (sum(large) + sum(4 * -(-size // BLOCK) for size in large) + 4 * small) + (CODES if large else 0)
