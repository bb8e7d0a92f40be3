"""How many images go through a network at a time."""

from __future__ import annotations

from collections.abc import Iterator

from draftplus.progress import beat

SAMPLING_BATCH = 16  # images per pass without gradient, unless train.sampling_batch_size says otherwise


def chunks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length). Each that is asked for is a sign of progress."""
    for start in range(0, length, size):
        beat()
        yield slice(start, min(start + size, length))
