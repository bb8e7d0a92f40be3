"""The pictures of pairs, read ahead in threads and kept in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draftplus.data.pairs import Broken, Pairs
from draftplus.data.pictures import Undecodable
from draftplus.rewards.preprocessing import Preprocessing, preprocess

MOST_THREADS = 8


@dataclass
class PairPictures:
    """Pictures by the index of their pair, as the network takes them but for the scaling of values.

    resizing: what is done to a picture once. room: bytes of memory; once it is full, other pairs are read anew each
    time. broken: pairs without a whole picture.
    """

    pairs: Pairs
    resizing: Preprocessing
    room: int
    broken: Broken
    kept: dict[int, Tensor] = field(default_factory=dict)
    coming: dict[int, Future[Tensor]] = field(default_factory=dict)
    used: int = 0

    def __post_init__(self) -> None:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
        self.pool = ThreadPoolExecutor(threads, "pictures")

    def ahead(self, rows: Sequence[int]) -> None:
        """Begins to read what will be asked for next."""
        for row in rows:
            if row not in self.kept and row not in self.coming:
                self.coming[row] = self.pool.submit(self._read, row)

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """The pictures, (n, 2, 3, h, w) uint8, of the n of these pairs that can be read, and their places in `rows`.

        Raises UserError where too many cannot.
        """
        self.ahead(rows)
        found, places = [], []
        for place, row in enumerate(rows):
            try:
                found.append(self._one(row))
                places.append(place)
            except Undecodable as reason:
                self.broken.add(self.pairs.where(row), str(reason))
        for row in rows:
            self.coming.pop(row, None)
        return torch.stack(found) if found else torch.empty(0, 2, 3, 1, 1, dtype=torch.uint8), places

    def _one(self, row: int) -> Tensor:
        if row in self.kept:
            return self.kept[row]
        both = self.coming[row].result()
        if self.used + both.nbytes <= self.room:
            self.kept[row] = both
            self.used += both.nbytes
        return both

    def _read(self, row: int) -> Tensor:
        resized = [preprocess(picture[None] / 255, self.resizing)[0] for picture in self.pairs.pictures(row)]
        return (torch.stack(resized) * 255).round().to(torch.uint8)  # in 8 bits, as the reference processors resize
