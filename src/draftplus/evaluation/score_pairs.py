"""What `draftplus reward score --pairs` does: which of two pictures each reward prefers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftplus import __version__
from draftplus.data.pairs import Pairs, read_pairs
from draftplus.data.pictures import Undecodable, decode
from draftplus.errors import UserError
from draftplus.evaluation.score import Item, Skipped, check_output, scorers_of, settings_of, written_scores
from draftplus.progress import progress
from draftplus.runs.rows import reward_key

TIE = 0.5


def score_pairs(
    source: str | Path, rewards: Sequence[str], overrides: Sequence[str], skip: int, output: Path | None
) -> dict[str, Any]:
    """Scores both pictures of pairs. The arguments, and what is returned, are those of `api.rewards.score_pairs`."""
    check_output(output)
    config = settings_of(overrides)
    with progress("reading pairs", None):
        pairs = read_pairs(source, labelled=False)
    tools, skipped = scorers_of(config, rewards, overrides), Skipped(skip, "pairs")
    with progress("scoring", 2 * len(pairs), unit="pictures") as advance:
        scores = tools.scores(_readable(pairs, skipped), advance)
    rows = [
        {
            "pair": pairs.where(index),
            "caption": pairs.caption(index),
            "label": None if math.isnan(pairs.label(index)) else pairs.label(index),
            **{key: [scores[2 * index][key], scores[2 * index + 1][key]] for key in map(reward_key, tools.rewards)},
        }
        for index in range(len(pairs))
        if 2 * index in scores
    ]
    if not rows:
        raise UserError("no pair could be read; the first is {file}: {reason}".format(**skipped.told[0]))
    told = {
        "draftplus": __version__,
        "rewards": {name: {**tools.described(name), **_summary(rows, name)} for name in tools.rewards},
        "pairs": rows,
        "skipped": skipped.told,
    }
    return written_scores(output, told, "pairs")


def _readable(pairs: Pairs, skipped: Skipped) -> Iterator[Item]:
    """Both pictures of each pair, at places 2i and 2i + 1; neither where one is not read."""
    for index in range(len(pairs)):
        try:
            first, second = (decode(data) for data in pairs.bytes_of(index))
        except Undecodable as error:
            skipped.add(pairs.where(index), error)
            continue
        yield Item(2 * index, first, pairs.caption(index))
        yield Item(2 * index + 1, second, pairs.caption(index))


def winner(scores: Sequence[float]) -> int | None:
    """Which of two scores is higher, 0 or 1; None for a tie and where one is not finite."""
    if not all(map(math.isfinite, scores)) or scores[0] == scores[1]:
        return None
    return int(scores[1] > scores[0])


def _summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """How often each wins, and how often rightly, of the pairs whose label is no tie; a tie of scores is half right."""
    key = reward_key(name)
    finite = [row for row in rows if all(map(math.isfinite, row[key]))]
    won = [winner(row[key]) for row in finite]
    labelled = [(row, win) for row, win in zip(finite, won, strict=True) if row["label"] not in (None, TIE)]
    right = [0.5 if win is None else float(win == (row["label"] < TIE)) for row, win in labelled]
    accuracy = sum(right) / len(right) if right else None
    return {
        "first_wins": won.count(0),
        "second_wins": won.count(1),
        "ties": won.count(None),
        "labelled": len(right),
        "accuracy": accuracy,
        "standard_error": None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "not_finite": [row["pair"] for row in rows if not all(map(math.isfinite, row[key]))],
    }
