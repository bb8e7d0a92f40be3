"""Which curves a run is drawn as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from draftplus.config import flatten
from draftplus.diffusion.methods import gated_steps
from draftplus.diffusion.regularisers import PREFIX, WINDOW
from draftplus.report import summary
from draftplus.report.charts import Chart, draw
from draftplus.report.read import Run
from draftplus.runs.rows import reward_key, reward_names

STEP = "kl/step/"  # before a sampling step, in the key of the two models' distance there


def curves(run: Run) -> str:
    """HTML of every curve that the run has numbers for."""
    charts = [*_training_reward(run), *_held_out_rewards(run), *_kl(run), *_diversity(run), *gradient(run)]
    figures = "".join(
        f"<figure><figcaption><strong>{escape(chart.title)}</strong> {escape(chart.note)}</figcaption>"
        f"{draw(chart, f'chart{i}')}</figure>"
        for i, chart in enumerate(charts)
    )
    return figures or "<p>There is nothing to draw yet.</p>"


def curve(run: Run, key: str, title: str, note: str, level: tuple[float, str] | None = None) -> list[Chart]:
    """A per-step quantity, smoothed where it is long enough to need it."""
    steps, values = summary.series(run, key)
    if not any(map(math.isfinite, values)):
        return []
    width = max(5, len(values) // 10)
    if len(values) < 2 * width:
        return [Chart(title, note, steps, values, level=level, markers=len(values) < 20)]
    note = f"{note} The bold line is a moving average over {width // 2 * 2 + 1} steps."
    return [Chart(title, note, steps, values, smoothed=summary.smooth(values, width), level=level)]


def _training_reward(run: Run) -> list[Chart]:
    rewards = run.config.get("reward")
    several = isinstance(rewards, dict) and len(rewards) > 1
    note = "The weighted sum that is optimised, on the training prompts." if several else "On the training prompts."
    charts = curve(run, "reward", "Training reward", note)
    if several:
        for name in reward_names(key for row in run.steps for key in row):
            charts += curve(
                run, reward_key(name), f"Training reward, {name}", "One of the rewards, without its weight."
            )
    return charts


def _held_out_rewards(run: Run) -> list[Chart]:
    charts = []
    for name in summary.held_out_rewards(one.held_out for one in run.evaluations):
        steps, values = summary.held_out_series(run, name)
        if not any(map(math.isfinite, values)):
            continue
        rows = [one.held_out for one in run.evaluations if one.step in steps]
        gains = [gain for row in rows if (gain := summary.gain_between(rows[0], row, name)) is not None]
        errors = [math.nan if gain.standard_error is None else gain.standard_error for gain in gains]
        complete = len(errors) == len(rows) > 1 and any(map(math.isfinite, errors))
        note = "On prompts and seeds that are never used in training."
        note += " Bars are one standard error of the paired gain over images." if complete else ""
        note += marks(run, steps)
        charts.append(
            Chart(
                f"Held-out reward, {name}", note, steps, values,
                errors=errors if complete else None, level=_start(steps, values), markers=True,
                best=run.best.get("step"), stopped=stopped_at(run, steps),
            )
        )  # fmt: skip
    return charts


def stopped_at(run: Run, steps: Sequence[int]) -> int | None:
    """The last evaluated step of a run that a guard ended."""
    return steps[-1] if run.stopped else None


def marks(run: Run, steps: Sequence[int]) -> str:
    told = " ★ marks the best evaluation." if run.best.get("step") in steps else ""
    return f"{told} × marks where a guard ended the run." if run.stopped else told


def _start(steps: Sequence[int], values: Sequence[float]) -> tuple[float, str]:
    return values[0], "base model" if steps[0] == 0 else "first evaluation"


def _kl(run: Run) -> list[Chart]:
    if not any(summary.series(run, "kl")[1]):  # without the term it is not evaluated
        return []
    whole = "Distance from the frozen model's prediction, over the steps that carry gradient."
    if not any(PREFIX in row for row in run.steps):
        return curve(run, "kl", "KL", whole)
    parts = [
        ("kl", "KL", "Distance from the frozen model's prediction: the sum of the parts below, without coefficients."),
        (WINDOW, "KL, steps with gradient", whole),
        (PREFIX, "KL, steps without gradient", "At the steps that were drawn, weighted as in the loss, without λ."),
    ]
    there = [part for part in parts if any(summary.series(run, part[0])[1])]
    if len(there) == 2:  # the sum is its only part
        there = there[1:]
    return [*(chart for part in there for chart in curve(run, *part)), *_distances(run)]


def _distances(run: Run) -> list[Chart]:
    """How far apart the two models are at each sampling step, by what training saw of them towards its end."""
    late = run.steps[-max(1, len(run.steps) // 3) :]
    seen: dict[int, list[float]] = {}
    for row in late:
        for key, value in row.items():
            known = summary.number(value)
            if (
                key.startswith(STEP)
                and key.removeprefix(STEP).isdecimal()
                and known is not None
                and math.isfinite(known)
            ):
                seen.setdefault(int(key.removeprefix(STEP)), []).append(known)
    if not seen:
        return []
    steps = sorted(seen)
    values = [sum(seen[step]) / len(seen[step]) for step in steps]
    total, flat = len(run.steps), flatten(run.config)
    note = (
        f"Mean over the last third of training (steps {total - len(late) + 1} to {total}) of the squared difference of "
        "the two models' predictions, where they were compared; 0 is pure noise."
    )
    gate, sampled = flat.get("objective.gate") or 0, flat.get("sampler.steps")
    if gate and isinstance(sampled, int) and (first := gated_steps(gate, sampled)):
        note += f" The frozen model draws the first {first}: there the tuned one would differ so much, if it drew them."
    return [Chart("KL, by sampling step", note, steps, values, markers=True, from_zero=True, axis="sampling step")]


def _diversity(run: Run) -> list[Chart]:
    steps, values = summary.held_out_series(run, None)
    if not any(map(math.isfinite, values)):
        return []
    note = "Mean pairwise LPIPS of one prompt's images; higher is more varied."
    floor = summary.number(flatten(run.config).get("stop.diversity_floor"))
    level = _start(steps, values) if floor is None else (values[0] * floor, "floor below which the run ends")
    note += " × marks where a guard ended the run." if run.stopped else ""
    stopped = stopped_at(run, steps)
    return [Chart("Diversity", note, steps, values, level=level, markers=True, from_zero=True, stopped=stopped)]


def gradient(run: Run) -> list[Chart]:
    clip = summary.number(flatten(run.config).get("optim.grad_clip"))
    _, values = summary.series(run, "grad_norm")
    in_reach = clip is not None and max((v for v in values if math.isfinite(v)), default=0.0) > 0.5 * clip
    level = (clip, "clipped above") if clip is not None and in_reach else None
    note = "Before clipping." if clip is None or in_reach else f"Before clipping, which starts at {clip:g}."
    charts = curve(run, "grad_norm", "Gradient norm", note, level)
    return charts + curve(
        run, "clipped_fraction", "Saturated pixel values", "The fraction at 0 or 1, where no gradient passes."
    )
