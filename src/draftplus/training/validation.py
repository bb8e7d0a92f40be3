"""What a reward gets right of the pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftplus.data.pair_split import TIE
from draftplus.rewards.preference import preference_loss

BINS = 10


@dataclass(frozen=True)
class Judged:
    """Pairs with a reward's scores, in float64. labels: (n,), how much the first is preferred. scores: (n, 2)."""

    labels: Tensor
    scores: Tensor

    @property
    def probabilities(self) -> Tensor:
        """How likely the first picture is preferred, (n,)."""
        return self.scores.softmax(1)[:, 0]

    @property
    def losses(self) -> Tensor:
        """(n,)"""
        return preference_loss(self.scores, self.labels)

    @property
    def ties(self) -> Tensor:
        """Which pairs are ties, (n,)."""
        return (self.labels - 0.5).abs() < TIE

    @property
    def points(self) -> Tensor:
        """1 where the preferred picture has the higher score, 0 where it has the lower, 1/2 where both have the same,
        (n,); of ties it means nothing."""
        sides = (self.scores[:, 0] - self.scores[:, 1]).sign() * (self.labels - 0.5).sign()
        return (sides + 1) / 2


def numbers(judged: Judged) -> dict[str, float]:
    """The numbers of a row of eval.jsonl: loss, accuracy over pairs that are no tie, the threshold for ties with its
    accuracy over all pairs, and the expected calibration error; NaN where there are no such pairs."""
    decided = ~judged.ties
    threshold, with_ties = tie_threshold(judged)
    return {
        "loss": float(judged.losses.mean()),
        "accuracy": float(judged.points[decided].mean()),
        "tie_threshold": threshold,
        "accuracy_with_ties": with_ties,
        "ece": sum(row["pairs"] * abs(row["confidence"] - row["preferred"]) for row in reliability(judged))
        / len(judged.labels),
        "pairs": len(judged.labels),
        "ties": int(judged.ties.sum()),
    }


def tie_threshold(judged: Judged) -> tuple[float, float]:
    """The difference of the two probabilities below which a pair is best called a tie, and the accuracy with it.

    As Kirstain et al. (2023) count: a point where the prediction is the label's, half a point where one of them is a
    tie and the other is not. The threshold is the one with the most points on these very pairs, the least of several.
    """
    gaps = (2 * judged.probabilities - 1).abs()
    # a pair with a gap below the threshold is called a tie: points before and after, sorted by the gap
    called = torch.where(judged.ties, 1.0, 0.5).double()
    judged_by_side = torch.where(judged.ties, 0.5, judged.points).double()
    order = gaps.argsort(stable=True)
    total = judged_by_side.sum() + torch.cat([torch.zeros(1).double(), (called - judged_by_side)[order].cumsum(0)])
    sorted_gaps = gaps[order]
    ends = torch.cat([torch.ones(1, dtype=torch.bool), sorted_gaps[1:] > sorted_gaps[:-1]])  # equal gaps go together
    allowed = torch.cat([ends, torch.ones(1, dtype=torch.bool)])
    best = int(total.masked_fill(~allowed, -torch.inf).argmax())
    n = len(gaps)
    edge = 0.0 if best == 0 else 1.0 if best == n else float((sorted_gaps[best - 1] + sorted_gaps[best]) / 2)
    return edge, float(total[best] / n)


def reliability(judged: Judged) -> list[dict[str, float]]:
    """How often the picture that is predicted is the preferred one, by how likely that was said to be: the bins of
    [0.5, 1] that have pairs, each with its mean confidence, its mean label, and its number of pairs."""
    first = judged.probabilities
    confidence = torch.maximum(first, 1 - first)
    preferred = torch.where(first >= 0.5, judged.labels, 1 - judged.labels)
    places = ((confidence - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    return [
        {
            "confidence": float(confidence[places == place].mean()),
            "preferred": float(preferred[places == place].mean()),
            "pairs": int((places == place).sum()),
        }
        for place in range(BINS)
        if bool((places == place).any())
    ]


def worst(judged: Judged, count: int) -> list[int]:
    """The pairs with the highest loss, by index, the worst first."""
    return judged.losses.argsort(descending=True, stable=True)[:count].tolist()


def gathered(parts: Sequence[Sequence[tuple[int, float, list[float]]]]) -> tuple[list[int], Judged]:
    """All processes' pairs, (index, label, scores), in the order of the index."""
    rows: list[Any] = sorted(row for part in parts for row in part)
    labels = torch.tensor([label for _, label, _ in rows], dtype=torch.float64)
    return [index for index, _, _ in rows], Judged(labels, torch.tensor([scores for *_, scores in rows]).double())
