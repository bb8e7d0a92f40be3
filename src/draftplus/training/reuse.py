"""Start noises that are used more than once, and what the frozen model drew from them before the gate.

What is drawn before the gate does not depend on what is trained. So where each start noise, with its prompt, is used
several times, the steps before the gate are taken for its first use alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from draftplus import rng
from draftplus.config.schema import PrefixCacheConfig
from draftplus.diffusion.sampler import Rollout


def source(settings: PrefixCacheConfig, step: int, seed: int) -> int:
    """The batch of prompts and start noises that an optimizer step uses, by its number; the same on every rank.

    `settings.batches` batches take turns, `settings.uses` turns long, in an order of its own in every turn but the
    first; then come the next ones. With one use it is the step itself.
    """
    block, place = divmod(step, settings.uses * settings.batches)
    turn, index = divmod(place, settings.batches)
    if turn:
        index = rng.permutation(settings.batches, seed, "prefix_cache", block * settings.uses + turn)[index]
    return block * settings.batches + index


def sources(settings: PrefixCacheConfig, steps: Iterable[int], seed: int) -> range:
    """A range that holds the batches of all these optimizer steps."""
    numbers = [source(settings, step, seed) for step in steps]
    return range(min(numbers), max(numbers) + 1) if numbers else range(0)


def uses(settings: PrefixCacheConfig, number: int, seed: int) -> list[int]:
    """The optimizer steps that use a batch, ascending."""
    length = settings.uses * settings.batches
    begin = number // settings.batches * length
    return [step for step in range(begin, begin + length) if source(settings, step, seed) == number]


class PrefixCache:
    """What was drawn before the gate, of this process's share of the latest batches.

    Nothing is lost with it: what is absent is drawn again, to the same bits.
    """

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._known: OrderedDict[int, Rollout] = OrderedDict()

    def get(self, number: int, draw: Callable[[], Rollout]) -> Rollout:
        """Where the trajectories of a batch stand at the gate; drawn, if it is not known."""
        if number not in self._known:
            while len(self._known) >= self._batches:
                self._known.popitem(last=False)
            self._known[number] = draw()
        return self._known[number]
