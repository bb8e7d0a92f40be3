"""Conditioning of prompts of different lengths."""

from __future__ import annotations

import torch

from draftplus.types import Conditioning
from tests.tiny import normal


def one(rows: int, length: int, seed: int) -> Conditioning:
    return Conditioning(normal(rows, length, 4, seed=seed), extras={"pooled": normal(rows, 2, seed=seed + 1)})


def test_equal_lengths_need_no_mask() -> None:
    parts = [one(2, 3, 1), one(1, 3, 5)]
    joined = Conditioning.concatenate(parts)
    assert joined.mask is None and len(joined) == 3
    assert torch.equal(joined.hidden, torch.cat([part.hidden for part in parts]))
    assert torch.equal(joined.extras["pooled"], torch.cat([part.extras["pooled"] for part in parts]))


def test_shorter_ones_are_padded_and_masked() -> None:
    parts = [one(2, 3, 1), one(1, 5, 5), one(1, 1, 9)]
    joined = Conditioning.concatenate(parts)
    assert joined.mask is not None and joined.mask.sum(1).tolist() == [3, 3, 5, 1]
    assert joined.hidden.shape == (4, 5, 4) and not joined.hidden[~joined.mask].any()
    assert torch.equal(joined.hidden[:2, :3], parts[0].hidden)
    again = Conditioning.concatenate([joined, one(1, 6, 3)])
    assert again.mask is not None and again.mask.sum(1).tolist() == [3, 3, 5, 1, 6]


def test_rows_keep_their_mask() -> None:
    joined = Conditioning.concatenate([one(1, 2, 1), one(1, 4, 2), one(1, 3, 3)])
    some = joined.rows(torch.tensor([2, 0]))
    assert some.mask is not None and some.mask.sum(1).tolist() == [3, 2]
    assert torch.equal(some.hidden, joined.hidden[[2, 0]])
    assert torch.equal(some.extras["pooled"], joined.extras["pooled"][[2, 0]])


def test_memory_is_of_all_tensors() -> None:
    joined = Conditioning.concatenate([one(1, 2, 1), one(1, 4, 2)])
    assert joined.nbytes == 2 * 4 * 4 * 8 + 2 * 4 + 2 * 2 * 8  # float64 tokens, a mask of bytes, the extras
