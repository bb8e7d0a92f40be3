"""Tables of a comparison: what differs between the runs and what came out, and the numbers of eval.json files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TypeGuard

from draftplus.config import flatten
from draftplus.progress import duration
from draftplus.report import summary
from draftplus.report.grouping import Comparison, differing_keys, finished, last_step, seed_of, settings_of
from draftplus.report.inputs import Evaluated
from draftplus.report.read import Run
from draftplus.report.wording import setting, show
from draftplus.runs.rows import HeldOut, MetricRow


def runs_table(
    comparison: Comparison, rewards: Sequence[str], series_of: Mapping[int, int], pages: Mapping[int, str]
) -> str:
    """HTML: a row for each run, with the keys that differ, its last numbers, best step, seconds and how it ended.

    series_of, pages: the number of each run's method, and the address of its own page, by id().
    """
    keys = differing_keys(comparison.runs)
    seeds = len({seed_of(run) for run in comparison.runs}) > 1
    heads = [
        *((key.rpartition(".")[2], key) for key in keys), *([("seed", "seed")] if seeds else []),
        *((f"reward {name}", f"last held-out mean of {name}") for name in rewards),
        ("LPIPS", "last mean pairwise LPIPS of one prompt's images"), ("of base", "LPIPS relative to the base model's"),
        ("steps", "optimizer steps"), ("best step", "from best.json"), ("time", "training and evaluation"),
        ("evaluation", "share of the time spent on evaluation"), ("ended", "how the run ended"),
    ]  # fmt: skip
    head = "".join(f'<th scope="col" title="{escape(told)}">{escape(text)}</th>' for text, told in heads)
    rows = "".join(
        f'<tr data-series="{series_of[id(run)]}" data-text="{escape(search_text(run, keys))}">'
        f'<th scope="row">{_linked(run, pages)}</th>{_cells(run, keys, seeds, rewards)}</tr>'
        for run in comparison.runs
    )
    return (
        '<div class="scroll"><table class="sortable"><thead><tr><th scope="col">run</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _linked(run: Run, pages: Mapping[int, str]) -> str:
    page = pages.get(id(run))
    return f'<a href="{escape(page)}">{escape(run.name)}</a>' if page else escape(run.name)


def search_text(run: Run, keys: Sequence[str]) -> str:
    """What the page's search field looks in: the run's name, its seed, and the keys that differ."""
    flat = {**{key: value for key, value in settings_of(run).items() if key in keys}, "seed": seed_of(run)}
    return " ".join([run.name, *(f"{key.rpartition('.')[2]}={setting(value)}" for key, value in flat.items())]).lower()


def _cells(run: Run, keys: Sequence[str], seeds: bool, rewards: Sequence[str]) -> str:
    flat = settings_of(run)
    last = run.evaluations[-1].held_out if run.evaluations else HeldOut()
    base = run.evaluations[0].held_out.lpips if run.evaluations and run.evaluations[0].step == 0 else None
    cells = [(setting(flat.get(key)) if key in flat else "–", flat.get(key)) for key in keys]
    cells += [(setting(seed_of(run)), seed_of(run))] if seeds else []
    for name in rewards:
        value = last.rewards.get(name)
        cells.append((show(value), value))
    share = last.lpips / base if last.lpips is not None and base else None
    training, evaluating = summary.training_seconds(run), summary.evaluation_seconds(run)
    total = (training[0] if training else 0.0) + evaluating
    steps = int(run.steps[-1]["step"]) if run.steps else 0
    cells += [
        (show(last.lpips), last.lpips), (f"{share:.0%}" if share is not None else "–", share), (str(steps), steps),
        (str(run.best.get("step", "–")), run.best.get("step")), (duration(total), total),
        (f"{evaluating / total:.0%}" if total else "–", evaluating / total if total else None),
        (ended(run), None),
    ]  # fmt: skip
    return "".join(
        f"<td{f' data-value={chr(34)}{float(value)}{chr(34)}' if _sorts(value) else ''}>{escape(text)}</td>"
        for text, value in cells
    )


def _sorts(value: object) -> TypeGuard[float]:
    """Whether a column sorts by this number; bool counts as 0 and 1."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def ended(run: Run) -> str:
    """How a run ended, in words."""
    if run.stopped:
        return f"stopped at step {run.stopped.get('step', '?')}: {run.stopped.get('reason', 'no reason given')}"
    if finished(run) and not run.running:
        return "finished"
    flat, how = flatten(run.config), "running" if run.running else "not finished"
    if flat.get("train.epochs"):
        return f"{how}: evaluated to step {max(0, last_step(run))} of {flat['train.epochs']} epochs"
    planned = flat.get("train.steps")
    return f"{how}: evaluated to step {max(0, last_step(run))} of {planned}"


def evaluations_table(targets: Sequence[Evaluated]) -> str:
    """HTML: the metrics of eval.json files, each with its 95% interval."""
    metrics = list(dict.fromkeys(name for target in targets for name in target.metrics))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in metrics)
    rows = "".join(
        f'<tr><th scope="row">{escape(target.label)}</th>'
        + "".join(_metric(target.metrics.get(name)) for name in metrics)
        + f"<td>{escape(target.source)}</td></tr>"
        for target in targets
    )
    return (
        '<div class="scroll"><table class="sortable"><thead><tr><th scope="col">evaluated</th>'
        f'{head}<th scope="col">file</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _metric(metric: MetricRow | None) -> str:
    if metric is None or metric.mean is None:
        return "<td>–</td>"
    mean, told = float(metric.mean), show(metric.mean)
    if metric.interval is not None:
        low, high = metric.interval
        told += f" [{show(low, mean)}, {show(high, mean)}]"
    images = f' title="{metric.images} images"' if metric.images else ""
    return f'<td data-value="{mean}"{images}>{told}</td>'
