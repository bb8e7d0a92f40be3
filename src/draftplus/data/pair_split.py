"""Which pairs are trained on and which are held out, and what each weighs in the loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.data.pairs import Pairs, caption_key
from draftplus.errors import UserError, notice

TIE = 1e-6  # a label nearer than this to one half is a tie


@dataclass(frozen=True)
class Split:
    """Pairs to train on and pairs to validate on, by index in their `Pairs`; both may be the same one."""

    train: Pairs
    train_rows: list[int]
    validation: Pairs
    validation_rows: list[int]

    def sides(self) -> list[tuple[Pairs, list[int]]]:
        """Those to train on, and those to validate on."""
        return [(self.train, self.train_rows), (self.validation, self.validation_rows)]


def is_tie(label: float) -> bool:
    """Whether a label prefers neither picture."""
    return abs(label - 0.5) < TIE


def split_by_file(train: Pairs, validation: Pairs, by: str) -> Split:
    """The pairs of one file and of another. by: "caption": pairs to train on whose caption the others have, too, are
    left out, and the user is told; "pair": all stay.

    Raises UserError where none is left.
    """
    rows = list(range(len(train)))
    if by == "caption":
        held_out = {caption_key(row.caption) for row in validation}
        rows = [i for i in rows if caption_key(train.caption(i)) not in held_out]
        gone = len(train) - len(rows)
        if not rows:
            raise UserError(
                "every caption of data.pairs is in data.validation too, so that none is left to train on; give other "
                "pairs, or set data.split_by=pair, which measures only how well known captions are judged"
            )
        if gone:
            notice(f"{gone} of {len(train)} pairs are not trained on: data.validation has their captions, too")
    return Split(train, rows, validation, list(range(len(validation))))


def split_by_share(pairs: Pairs, share: float, by: str) -> Split:
    """Holds out a share of the captions, or of the pairs, evenly spaced in the order of the files; at least one.

    Captions that differ only in case, punctuation or white space are one. Raises UserError for a single caption.
    """
    keys = [caption_key(row.caption) if by == "caption" else str(i) for i, row in enumerate(pairs)]
    distinct = list(dict.fromkeys(keys))
    n = len(distinct)
    if n < 2:
        what = f"all {len(pairs)} pairs have the same caption" if by == "caption" and len(pairs) > 1 else "one pair"
        mend = "data.split_by=pair holds out pairs instead" if len(pairs) > 1 else "give more pairs"
        raise UserError(
            f"{what}, so that no caption can be held out for validation; {mend}, or name other pairs in data.validation"
        )
    count = min(max(1, round(share * n)), n - 1)
    held_out = {distinct[(2 * i + 1) * n // (2 * count)] for i in range(count)}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(keys):
        sides[key in held_out].append(i)
    return Split(pairs, sides[0], pairs, sides[1])


def weights(pairs: Pairs, rows: Sequence[int], balance: str) -> dict[int, float]:
    """What each pair weighs in the loss, 1 on average.

    balance: "none": all the same. "caption": all captions the same, as PickScore weighs them, so that one with many
    pairs does not count more. "outcome": ties together as much as decided pairs together. Which picture comes first
    needs no balance: the loss of a pair is the same in either order, because each picture is scored by itself.
    """
    kinds: dict[int, object] = dict.fromkeys(rows)
    if balance == "caption":
        kinds = {i: caption_key(pairs.caption(i)) for i in rows}
    elif balance == "outcome":
        kinds = {i: is_tie(pairs.label(i)) for i in rows}
    counts = Counter(kinds.values())
    return {i: len(rows) / (len(counts) * counts[kind]) for i, kind in kinds.items()}


def evenly(rows: Sequence[int], most: int | None) -> list[int]:
    """At most so many of the rows, evenly spaced."""
    n = len(rows)
    if most is None or n <= most:
        return list(rows)
    return [rows[math.floor((2 * i + 1) * n / (2 * most))] for i in range(most)]
