"""What a run achieved, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftplus.metrics.intervals import paired_gain
from draftplus.report.read import Run
from draftplus.runs.rows import HeldOut, Number

if TYPE_CHECKING:
    from torch import Tensor

    from draftplus.metrics.intervals import Estimate


@dataclass(frozen=True)
class Change:
    """A held-out mean at the first and the last evaluation.

    gain: of the same prompts and seeds. error: the standard error of the gain over `images` images with their scores
    at both, prompts as strata (`paired_gain`); None where they were not recorded. after, gain: None where there is only
    one evaluation.
    """

    name: str
    before: float
    after: float | None = None
    gain: float | None = None
    error: float | None = None
    images: int | None = None


def number(value: Any) -> float | None:
    """The value as a float; None where it is no number. NaN and infinity stay."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def series(run: Run, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the training steps that have a number under the key; NaN and infinity stay."""
    return _known((int(row["step"]), row.get(key)) for row in run.steps)


def held_out_series(run: Run, reward: str | None) -> tuple[list[int], list[float]]:
    """Steps and values of a reward, or of LPIPS for None, at the evaluations that have it; NaN and infinity stay."""
    rows = [(one.step, one.held_out) for one in run.evaluations]
    return _known((step, held.lpips if reward is None else held.rewards.get(reward)) for step, held in rows)


def _known(points: Iterable[tuple[int, Any]]) -> tuple[list[int], list[float]]:
    told = [(step, known) for step, value in points if (known := number(value)) is not None]
    return [step for step, _ in told], [value for _, value in told]


def held_out_rewards(measured: Iterable[HeldOut]) -> list[str]:
    """The rewards that were measured, in order of appearance."""
    return list(dict.fromkeys(name for one in measured for name in one.rewards))


def gain_between(first: HeldOut, last: HeldOut, reward: str) -> Estimate | None:
    """The paired gain of a reward from one evaluation to another, over the same images.

    None where the images' scores were not recorded, or not of the same images.
    """
    before, after = first.scores(reward), last.scores(reward)
    same = first.prompts == last.prompts and before and after and len(before[0]) == len(after[0])
    if not same:
        return None

    def tensors(scores: list[list[Number]] | None) -> list[Tensor]:
        return [torch.tensor([math.nan if v is None else v for v in one]).double() for one in scores or ()]

    return paired_gain(tensors(after), tensors(before))


def reward_changes(run: Run) -> list[Change]:
    """Each reward's change over the held-out prompts, first to last evaluation."""
    names = held_out_rewards(one.held_out for one in run.evaluations)
    return [change for name in names if (change := _change(run, name)) is not None]


def diversity_change(run: Run) -> Change | None:
    """The change of the mean pairwise LPIPS, without an error: the distances of its pairs are not recorded."""
    return _change(run, None)


def _change(run: Run, reward: str | None) -> Change | None:
    steps, values = held_out_series(run, reward)
    if not steps:
        return None
    name = reward or "lpips"
    if len(steps) == 1:
        return Change(name, values[0])
    first, last = (one.held_out for one in run.evaluations if one.step in (steps[0], steps[-1]))
    gain = gain_between(first, last, reward) if reward is not None else None
    if gain is None:
        return Change(name, values[0], values[-1], values[-1] - values[0])
    return Change(name, values[0], values[-1], gain.mean, gain.standard_error, gain.images)


def training_seconds(run: Run) -> tuple[float, float] | None:
    """Seconds of all steps together, and of one (the median). None where no step recorded its time."""
    _, seconds = series(run, "seconds")
    return (float(np.sum(seconds)), float(np.median(seconds))) if seconds else None


def evaluation_seconds(run: Run) -> float:
    """Seconds of all evaluations together."""
    return float(np.sum(_known((one.step, one.held_out.seconds) for one in run.evaluations)[1]))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """A centred moving average over up to `width` finite values; NaN where a window holds none."""
    array = np.asarray(values, dtype=float)
    half = width // 2
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    kept = [window[np.isfinite(window)] for window in windows]
    return [float(window.mean()) if len(window) else math.nan for window in kept]
