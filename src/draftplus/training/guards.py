"""Guards against reward hacking: when a run should end, and which of its steps is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from draftplus.config import RewardConfig, StopConfig
from draftplus.runs.files import write_text
from draftplus.runs.journal import Row
from draftplus.runs.rows import reward_key


def stop_reason(rows: Sequence[Row], stop: StopConfig, held_out: Iterable[str]) -> str | None:
    """Why a run ends after its latest evaluation, or None.

    rows: of eval.jsonl, all of the same images, that of the base model (step 0) first. held_out: names of rewards that
    are measured and not optimised.
    """
    if len(rows) < 2:
        return None
    base, now = rows[0], rows[-1]
    floor = stop.diversity_floor
    if floor is not None and not (_is_number(base.get("lpips")) and _is_number(now.get("lpips"))):
        return f"LPIPS is not finite, so it cannot be compared with stop.diversity_floor={floor:g}"
    if floor is not None and now["lpips"] < floor * base["lpips"]:
        return (
            f"LPIPS is {now['lpips']:.4g}, {now['lpips'] / base['lpips']:.0%} of the base model's {base['lpips']:.4g}; "
            f"stop.diversity_floor is {floor:g}"
        )
    if stop.held_out_drop is not None:
        for name in [name for name in held_out if reward_key(name) in now]:  # a new one is not measured yet
            values = {row["step"]: row[key] for row in rows if _is_number(row.get(key := reward_key(name)))}
            best = max(values, key=values.__getitem__, default=0)
            if now["step"] not in values:
                return f"held-out reward {name} is not finite"
            value, drop = values[now["step"]], values[best] - values[now["step"]]
            if drop > stop.held_out_drop:
                return (
                    f"held-out reward {name} is {value:.4g}, {drop:.4g} below its best of {values[best]:.4g} "
                    f"at step {best}; stop.held_out_drop is {stop.held_out_drop:g}"
                )
    return None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and math.isfinite(value)


def write_stopped(run: Path, step: int, reason: str | None) -> None:
    """Writes stopped.json, or removes it where there is no reason to end."""
    if reason is None:
        (run / "stopped.json").unlink(missing_ok=True)
    else:
        write_text(run / "stopped.json", json.dumps({"step": step, "reason": reason}, indent=1))


def write_best(run: Path, rows: Sequence[Row], rewards: Mapping[str, RewardConfig], stop: StopConfig) -> None:
    """Writes best.json: the evaluated step, past the base model, with the highest held-out value of what is trained.

    rows: as `stop_reason` takes them. With `stop.diversity_floor`, of the steps whose LPIPS is not below it. Removes it
    where there is no such step.
    """
    past = [row for row in rows if row["step"] > 0 and _is_number(row.get("reward"))]
    floor = stop.diversity_floor
    if floor is not None and rows:
        base = rows[0].get("lpips")
        past = [r for r in past if _is_number(base) and _is_number(r.get("lpips")) and r["lpips"] >= floor * base]
    if not past:
        (run / "best.json").unlink(missing_ok=True)
        return
    best = max(past, key=lambda row: float(row["reward"]))
    terms = " + ".join(
        ("" if one.weight == 1 else f"{one.weight:g} x ") + name + (" (normalised)" if one.normalise else "")
        for name, one in rewards.items()
    )
    rule = f"highest mean of {terms} on the held-out prompts, over the evaluated steps"
    if floor is not None:
        rule += f" with LPIPS of at least {floor:g} times the base model's"
    write_text(run / "best.json", json.dumps({"step": best["step"], "value": best["reward"], "rule": rule}, indent=1))
