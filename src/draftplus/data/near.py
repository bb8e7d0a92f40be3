"""Which prompts say the same, or nearly the same, as one before."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

HASHES = 128  # of MinHash
MISSED = 0.01  # at most this share of the pairs that are just as similar as asked for is not found
LEAST = 0.5  # what is less similar than this has too little in common to be called near
CHUNK = 2**12  # prompts that are hashed together
CACHED = 2**14  # prompts whose pairs of words are kept
MOST_COMPARED = 16  # prompts with which one is compared because they share one band


class _Plain(dict[int, int]):
    """For `str.translate`: punctuation becomes a space, everything else stays."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(" ") if unicodedata.category(chr(code)).startswith("P") else code
        return self[code]


_PLAIN = _Plain()


def folded(prompt: str) -> str:
    """The prompt without differences in case, punctuation, white space and compatible characters (NFKC).

    A prompt of nothing but punctuation keeps it.
    """
    text = prompt if prompt.isascii() else unicodedata.normalize("NFKC", prompt)
    text = text.casefold()
    return " ".join(text.translate(_PLAIN).split()) or " ".join(text.split())


def near_duplicates(
    prompts: Sequence[str], threshold: float, advance: Callable[[int, str], None] = lambda done, note: None
) -> NDArray[np.int64]:
    """For each of n prompts the earlier one that it nearly repeats, or -1: (n,).

    A prompt's shingles are the pairs of neighbouring words of `folded`; a single word is its own. Two prompts are near
    duplicates if the Jaccard similarity of their sets of shingles, |A ∩ B| / |A ∪ B|, is at least the threshold, from
    0.5 to 1. Prompts are taken in order, and compared with those that were not found to repeat another.

    Which to compare is found by MinHash in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4): at
    least 99% of the pairs at the threshold, and more of those above it. What is found is compared exactly; where more
    than 16 share a band, with the first 16. The result depends on the prompts, their order and the threshold only.

    advance: told how many prompts were hashed.
    """
    bands, rows = bands_of(threshold)
    factors, terms = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, (2, bands * rows), np.uint64)
    factors |= np.uint64(1)
    keys = np.empty((bands, len(prompts)), np.uint64)
    for begin in range(0, len(prompts), CHUNK):
        shingles, starts = _shingles(prompts[begin : begin + CHUNK])
        for band in range(bands):
            key = np.zeros(len(starts), np.uint64)
            for row in range(band * rows, (band + 1) * rows):
                key = _mixed(key + np.minimum.reduceat(shingles * factors[row] + terms[row], starts))
            keys[band, begin : begin + CHUNK] = key
        advance(begin + len(starts), "")
    advance(len(prompts), "comparing")
    buckets = np.stack([_shared(row) for row in keys])
    del keys
    return _repeats(buckets, prompts, threshold)


def bands_of(threshold: float) -> tuple[int, int]:
    """How many bands of how many hashes find `1 - MISSED` of the pairs of this similarity."""
    for rows in range(16, 1, -1):
        bands = HASHES // rows
        if (1 - threshold**rows) ** bands <= MISSED:
            return bands, rows
    return HASHES, 1


def _shingles(prompts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all prompts' shingles one after another, and where each prompt's begin."""
    words = [folded(prompt).encode().split(b" ") for prompt in prompts]
    hashes = np.array([zlib.crc32(word) for some in words for word in some], np.uint64)
    count = np.array([len(some) for some in words])
    last = np.cumsum(count) - 1
    following = np.roll(hashes, -1)
    following[last] = 0  # a prompt of one word
    kept = np.ones(len(hashes), bool)
    kept[last[count > 1]] = False
    pairs = (hashes << np.uint64(32) | following)[kept]
    return _mixed(pairs), np.concatenate([[0], np.cumsum(np.maximum(count - 1, 1))[:-1]])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each 64-bit number to another one, as if at random (the end of SplitMix64, Steele et al. 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _shared(keys: NDArray[np.uint64]) -> NDArray[np.int32]:
    """For each key the number of its bucket; -1 where no other has that key."""
    order = np.argsort(keys)
    changes = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
    bucket = np.cumsum(changes) - 1
    found = np.empty(len(keys), np.int32)
    found[order] = np.where(np.bincount(bucket)[bucket] > 1, bucket, -1)
    return found


def _repeats(buckets: NDArray[np.int32], prompts: Sequence[str], threshold: float) -> NDArray[np.int64]:
    repeats = np.full(len(prompts), -1, np.int64)
    kept: dict[int, list[int]] = {}

    @lru_cache(maxsize=CACHED)
    def pairs_of(number: int) -> set[tuple[str, ...]]:
        words = folded(prompts[number]).split()
        return set(pairwise(words)) if len(words) > 1 else {(words[0],)}

    for number in np.flatnonzero((buckets >= 0).any(0)).tolist():
        shared = enumerate(buckets[:, number].tolist())
        places = [band * len(prompts) + bucket for band, bucket in shared if bucket >= 0]
        mine = pairs_of(number)
        for other in sorted({other for place in places for other in kept.get(place, ())}):
            both = len(mine & pairs_of(other))
            if both >= threshold * (len(mine) + len(pairs_of(other)) - both):
                repeats[number] = other
                break
        else:
            for place in places:
                there = kept.setdefault(place, [])
                if len(there) < MOST_COMPARED:
                    there.append(number)
    return repeats
