"""Which prompts make up a step, on each rank: a pure function, so that resuming needs no state."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from draftplus.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Batch(Generic[T]):
    """One rank's share of a step: n prompts, and their n positions in the global batch, which address the noise.

    Of a training of a reward, pairs stand in the place of prompts.
    """

    prompts: list[T]
    indices: list[int]

    def __len__(self) -> int:
        return len(self.prompts)


def batch(
    prompts: Sequence[T],
    step: int,
    seed: int,
    global_batch_size: int,
    images_per_prompt: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Batch[T]:
    """The share of `rank` in step `step`, counted from 0. Needs sizes that `check_batch_sizes` accepts.

    The steps cut one endless stream into global batches: the prompts in an order drawn from (seed, epoch), epoch after
    epoch, each `images_per_prompt` times in a row. Every prompt comes once per epoch, also where an epoch ends inside a
    batch. Ranks take contiguous slices, so that theirs one after another are the batch of a single process.
    """
    local = global_batch_size // world_size
    indices = list(range(rank * local, (rank + 1) * local))
    first = step * (global_batch_size // images_per_prompt)
    return Batch(_stream(prompts, seed, [first + index // images_per_prompt for index in indices]), indices)


def visited(
    prompts: Sequence[str], steps: range, seed: int, global_batch_size: int, images_per_prompt: int = 1
) -> list[str]:
    """The distinct prompts of some steps, all ranks' together."""
    per_step = global_batch_size // images_per_prompt
    places = range(steps.start * per_step, steps.stop * per_step)
    whole_epoch = len(places) >= 2 * len(prompts)  # wherever it begins
    return list(dict.fromkeys(prompts if whole_epoch else _stream(prompts, seed, places)))


def _stream(prompts: Sequence[T], seed: int, positions: Sequence[int]) -> list[T]:
    places = [divmod(position, len(prompts)) for position in positions]  # (epoch, place in it)
    return [prompts[_order(len(prompts), seed, epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=2)  # of the epoch that is going on, and the one that begins
def _order(n: int, seed: int, epoch: int) -> array[int]:
    from draftplus import rng  # torch, which the checks of batch sizes do without

    return array("q", rng.permutation(n, seed, "prompts", epoch))


def steps_of_epochs(epochs: int, prompts: int, global_batch_size: int, images_per_prompt: int = 1) -> int:
    """The fewest steps in which each of the prompts comes at least `epochs` times."""
    return math.ceil(epochs * prompts * images_per_prompt / global_batch_size)


def check_batch_sizes(
    global_batch_size: int, micro_batch_size: int, images_per_prompt: int = 1, world_size: int = 1, updates: int = 1
) -> None:
    """UserError if the prompts, ranks, DDPO's updates or micro-batches do not divide the batch evenly.

    It names both values and a remedy.
    """
    for key, value in (
        ("train.global_batch_size", global_batch_size),
        ("train.micro_batch_size", micro_batch_size),
        ("data.images_per_prompt", images_per_prompt),
    ):
        if value < 1:
            raise UserError(f"{key}={value}: it must be at least 1.")
    _divides(global_batch_size, 1, "", "data.images_per_prompt={}", images_per_prompt)
    _divides(global_batch_size, 1, "", "{} ranks", world_size)
    ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
    _divides(global_batch_size, world_size, ranks, "objective.ddpo.updates={}", updates)
    each = f" in each of {updates} updates" if updates > 1 else ""
    _divides(global_batch_size, world_size * updates, f"{each}{ranks}", "train.micro_batch_size={}", micro_batch_size)


def _divides(batch: int, shares: int, where: str, part: str, divisor: int) -> None:
    """UserError if `divisor` does not divide one of `shares` equal shares of the batch. where: the shares, in words."""
    size = batch // shares
    if size % divisor:
        fitting = [n for n in range(1, size + 1) if size % n == 0]
        near = min(fitting, key=lambda n: abs(n - divisor))
        larger = math.ceil(size / divisor) * divisor * shares
        what = f" gives {size} images{where}, which" if where else ""
        raise UserError(
            f"train.global_batch_size={batch}{what} cannot be divided evenly by {part.format(divisor)}.\n"
            f"Use train.global_batch_size={larger} or {part.format(near)}, for example."
        )
