"""Randomness is addressed, not consumed.

A draw is a function of (seed, stream, step, index, draw), made on the CPU in float32: one process with a batch of
eight and eight processes with one sample each draw the same noise, and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


def address(seed: int, stream: str, step: int = 0, index: int = 0, draw: int = 0) -> int:
    """A 63-bit generator seed for one place in one stream; different addresses do not collide in practice."""
    text = f"{seed}/{stream}/{step}/{index}/{draw}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, step: int = 0, index: int = 0, draw: int = 0) -> torch.Generator:
    """A CPU generator seeded with the address."""
    return torch.Generator("cpu").manual_seed(address(seed, stream, step, index, draw))


def normal(
    shape: Sequence[int], seed: int, stream: str, step: int = 0, indices: Iterable[int] = (0,), draw: int = 0
) -> Tensor:
    """Standard normal draws, one per global sample index: (len(indices), *shape), float32 on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, step, index, draw)) for index in indices])


def integer(low: int, high: int, seed: int, stream: str, step: int = 0, draw: int = 0) -> int:
    """A uniform integer in [low, high), the same on every rank."""
    return int(torch.randint(low, high, (), generator=generator(seed, stream, step, 0, draw)))


def permutation(n: int, seed: int, stream: str, step: int = 0) -> list[int]:
    """A random order of range(n), the same on every rank."""
    return torch.randperm(n, generator=generator(seed, stream, step)).tolist()


def stock_noise(
    shape: Sequence[int], seeds: Iterable[int], dtype: torch.dtype = torch.float32, draw: int = 0
) -> Tensor:
    """Noise as stock diffusers draws it with one CPU generator per image: (len(seeds), *shape), in at least float32.

    dtype: that stock draws in, to which a draw in half precision is rounded. draw: which of a generator's draws; the
    first is the initial noise.
    """
    # diffusers draws (1, c, h, w) per generator; the leading 1 does not change the values
    drawn = []
    for generator in (torch.Generator("cpu").manual_seed(seed) for seed in seeds):
        drawn.append([torch.randn(1, *shape, generator=generator, dtype=dtype) for _ in range(draw + 1)][-1])
    return torch.cat(drawn).to(torch.promote_types(torch.float32, dtype))


@dataclass(frozen=True)
class _Samples:
    seed: int
    step: int
    indices: Sequence[int]
    draws: Counter[str] = field(default_factory=Counter)


_SAMPLES: ContextVar[_Samples | None] = ContextVar("samples", default=None)


@contextmanager
def samples(seed: int, step: int, indices: Sequence[int]) -> Iterator[None]:
    """Inside, `generators` draws for these samples, so that what is called there needs not be told where it is."""
    token = _SAMPLES.set(_Samples(seed, step, indices))
    try:
        yield
    finally:
        _SAMPLES.reset(token)


def generators(stream: str, count: int) -> list[torch.Generator]:
    """One CPU generator for each of `count` samples; every call is the stream's next draw.

    Outside of `samples`, where nothing has an address, torch's own generator seeds them. ValueError where `samples` are
    not so many.
    """
    here = _SAMPLES.get()
    if here is None:
        return [torch.Generator("cpu").manual_seed(seed) for seed in torch.randint(2**62, (count,)).tolist()]
    if len(here.indices) != count:
        raise ValueError(f"{count} samples, but the step is at {len(here.indices)}")
    draw = here.draws[stream]
    here.draws[stream] += 1
    return [generator(here.seed, stream, here.step, index, draw) for index in here.indices]
