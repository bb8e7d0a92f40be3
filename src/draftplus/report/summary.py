"""What a run achieved, in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftplus.report.read import Row, Run


@dataclass(frozen=True)
class Change:
    """A held-out mean at the first and the last evaluation.

    gain: of the same prompts and seeds. error: the standard error of the paired gain over `images` pairs, where
    each image's value was recorded. after, gain: None where there is only one evaluation.
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


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under the key; NaN and infinity stay."""
    points = [(int(row["step"]), value) for row in rows if (value := number(row.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def reward_names(rows: Sequence[Row]) -> list[str]:
    """The names after `reward/`, in order of appearance."""
    return list(dict.fromkeys(key.removeprefix("reward/") for row in rows for key in row if key.startswith("reward/")))


def paired(first: Row, row: Row, name: str) -> tuple[float, float | None, int] | None:
    """Mean gain of a reward from one evaluation to another over the same images, its standard error, and the pairs.

    None where the images' values were not recorded, or not for the same images.
    """
    before, after = ((r.get("per_image") or {}).get(name) for r in (first, row))
    same_prompts = (first.get("lpips_per_prompt") or {}).keys() == (row.get("lpips_per_prompt") or {}).keys()
    if not before or not after or len(before) != len(after) or not same_prompts:
        return None
    gains = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    error = float(gains.std(ddof=1) / math.sqrt(len(gains))) if len(gains) > 1 else None
    return float(gains.mean()), error, len(gains)


def reward_changes(run: Run) -> list[Change]:
    """Each reward's change over the held-out prompts, first to last evaluation."""
    return [change for name in reward_names(run.evaluations) if (change := _change(run, f"reward/{name}", name))]


def diversity_change(run: Run) -> Change | None:
    """The change of the mean pairwise LPIPS."""
    return _change(run, "lpips", "lpips")


def _change(run: Run, key: str, name: str) -> Change | None:
    rows = [row for row in run.evaluations if number(row.get(key)) is not None]
    if not rows:
        return None
    before = float(rows[0][key])
    if len(rows) == 1:
        return Change(name, before)
    after = float(rows[-1][key])
    pairs = paired(rows[0], rows[-1], name)
    if pairs is None:
        return Change(name, before, after, after - before)
    return Change(name, before, after, *pairs)


def training_seconds(run: Run) -> tuple[float, float] | None:
    """Seconds of all steps together, and of one (the median). None where no step recorded its time."""
    _, seconds = series(run.steps, "seconds")
    return (float(np.sum(seconds)), float(np.median(seconds))) if seconds else None


def evaluation_seconds(run: Run) -> float:
    """Seconds of all evaluations together."""
    return float(np.sum(series(run.evaluations, "seconds")[1]))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """A centred moving average over up to `width` finite values; NaN where a window holds none."""
    array = np.asarray(values, dtype=float)
    half = width // 2
    windows = [array[max(0, i - half) : i + half + 1] for i in range(len(array))]
    kept = [window[np.isfinite(window)] for window in windows]
    return [float(window.mean()) if len(window) else math.nan for window in kept]
