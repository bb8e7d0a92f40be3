"""The page of a run that trains a reward: its curves, how well its probabilities hold, and what it gets most wrong."""

from __future__ import annotations

import importlib.resources
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from draftplus import __version__
from draftplus.config import RewardTrainConfig, flatten, load_reward_run_config, to_dict
from draftplus.errors import UserError
from draftplus.progress import duration
from draftplus.report import charts, page, paper, summary
from draftplus.report.charts import Chart, draw
from draftplus.report.curves import curve, gradient, stopped_at
from draftplus.report.pictures import data_uri, file_of
from draftplus.report.read import Run, is_huge, is_whole, not_numbers, read_json, read_object, read_rows
from draftplus.report.wording import show
from draftplus.runs.directory import is_held, saved_steps, step_name

CURVES = {
    "loss": ("Validation loss", "Divergence of the probabilities from the labels, on pairs that are not trained on."),
    "accuracy": ("Validation accuracy", "How often the preferred picture has the higher score; ties are left out."),
    "ece": ("Calibration error", "How far the probabilities are from how often they come true, on average."),
}


@dataclass
class Training:
    """What such a run holds. validations: the rows of eval.jsonl. kept: pairs.json of the step that is shown."""

    run: Run
    validations: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def read_training(directory: Path) -> Training:
    """What is in the run directory, as far as it got; what is absent is named."""
    run = Run(directory, running=is_held(directory))
    try:
        run.config = to_dict(load_reward_run_config(directory))
    except UserError as error:
        run.missing.append(f"config.yaml ({error})")
    run.steps = read_rows(run, "metrics.jsonl", "no training curves", not_numbers)
    told = Training(run, read_rows(run, "eval.jsonl", "no validation", not_numbers))
    run.best, run.stopped = read_object(run, "best.json"), read_object(run, "stopped.json")
    steps = saved_steps(directory / "samples")
    if not steps:
        run.missing.append("samples/ (no pairs)")
        return told
    told.step = run.best["step"] if run.best.get("step") in steps else steps[-1]
    kept = read_json(run, f"samples/{step_name(told.step)}/pairs.json")
    if isinstance(kept, dict):
        told.kept = kept
    else:
        run.missing.append(f"samples/{step_name(told.step)}/pairs.json (no pairs)")
    return told


def render(told: Training) -> str:
    """The page as text."""
    run, files = told.run, importlib.resources.files("draftplus.report")
    template = Template((files / "pairs.html").read_text(encoding="utf-8"))
    at = page.near(run.directory)
    use = ["draftplus", "train", "emoji", "reward=clip", f"reward.clip.path={at / 'reward'}"]
    repeat = ["draftplus", "reward", "train", str(at / "config.yaml"), f"name={run.name}-again"]
    pictures = _worst(told)
    return template.substitute(
        style=(files / "report.css").read_text(encoding="utf-8"),
        name=escape(run.name),
        method=escape(_in_words(run)),
        progress=escape(page.progress_of(run)),
        missing=page.missing(run),
        cards=_cards(told),
        charts=_charts(told),
        about_pairs=escape(_about(told)),
        pictures=pictures,
        configuration=page.configuration(run, RewardTrainConfig),
        repeat=escape(shlex.join(repeat)),
        use=escape(shlex.join(use)),
        version=escape(__version__),
        script=(files / "pictures.js").read_text(encoding="utf-8"),
    )


def _in_words(run: Run) -> str:
    flat = flatten(run.config)
    towers = {"image": "the image tower", "text": "the text tower"}.get(str(flat.get("model.towers")), "both towers")
    return (
        f"A CLIPModel, {flat.get('model.path')}, of which {towers} learned from the pairs of {flat.get('data.pairs')}."
    )


def _series(told: Training, key: str) -> tuple[list[int], list[float]]:
    known = [(row["step"], value) for row in told.validations if (value := summary.number(row.get(key))) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _cards(told: Training) -> str:
    best, cards = told.run.best.get("step"), []
    for key, (title, _) in CURVES.items():
        steps, values = _series(told, key)
        if not steps:
            continue
        at = steps.index(best) if best in steps else len(steps) - 1
        arrow = show(values[0], values[at]) + (f" → {show(values[at], values[0])}" if at else "")
        cards.append(page.card(title, arrow, f"step {steps[0]} to {steps[at]}" if at else "one validation only"))
    steps, thresholds = _series(told, "tie_threshold")
    if steps:
        at = steps.index(best) if best in steps else len(steps) - 1
        row = next(row for row in told.validations if row["step"] == steps[at])
        detail = (
            f"difference of probabilities; accuracy with ties {show(summary.number(row.get('accuracy_with_ties')))}"
        )
        cards.append(page.card("A tie is below", f"{thresholds[at]:.3f}", detail))
    seconds = summary.training_seconds(told.run)
    if seconds is not None:
        cards.append(page.card("Training time", duration(seconds[0]), f"{seconds[1]:.2f} s per step"))
    return "".join(cards) or "<p>No numbers are recorded yet.</p>"


def _charts(told: Training) -> str:
    run = told.run
    drawn = [
        *curve(run, "loss", "Training loss", "On the pairs of each step."),
        *curve(run, "accuracy", "Training accuracy", "On the pairs of each step, without ties."),
    ]
    for key, (title, note) in CURVES.items():
        steps, values = _series(told, key)
        if any(map(math.isfinite, values)):
            best, stopped = run.best.get("step"), stopped_at(run, steps)
            drawn.append(Chart(title, note, steps, values, markers=True, best=best, stopped=stopped))
    drawn += gradient(run)
    figures = [(chart.title, chart.note, draw(chart, f"chart{i}")) for i, chart in enumerate(drawn)]
    bins = _bins(told)
    if bins:
        note = f"At step {told.step}: how often the predicted picture is the preferred one. On the line they agree."
        figures.append(("Reliability", note, _reliability(bins)))
    return (
        "".join(
            f"<figure><figcaption><strong>{escape(title)}</strong> {escape(note)}</figcaption>{svg}</figure>"
            for title, note, svg in figures
        )
        or "<p>There is nothing to draw yet.</p>"
    )


def _bins(told: Training) -> list[tuple[float, float, float]]:
    rows = told.kept.get("reliability")
    keys = ("confidence", "preferred", "pairs")
    found = [[summary.number(row.get(key)) for key in keys] for row in rows or () if isinstance(row, dict)]
    return [(a, b, c) for a, b, c in found if a is not None and b is not None and c is not None]


def _reliability(bins: Sequence[tuple[float, float, float]]) -> str:
    most = max(count for *_, count in bins)
    with rc_context(charts.STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.12, 0.2, 0.865, 0.75))
        axes.plot([0.5, 1], [0.5, 1], color=charts.MARK, linewidth=1.3, linestyle=(0, (4, 3)))
        said, came = [a for a, *_ in bins], [b for _, b, _ in bins]
        axes.plot(said, came, color=charts.LINE, linewidth=1.5)
        axes.scatter(said, came, [12 + 90 * count / most for *_, count in bins], color=charts.LINE, zorder=3)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(min(0.45, *came) - 0.05, 1.05)
        axes.set_xlabel("probability that was predicted; larger dots are of more pairs")
        axes.spines["left"].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=paper.SVG_METADATA)
    return charts.inline(buffer.getvalue(), "reliability", "Reliability")


def _about(told: Training) -> str:
    last = next((row for row in told.validations if row["step"] == told.step), {})
    many = (
        f"{last['pairs']:.0f} pairs of validation" if summary.number(last.get("pairs")) else "the pairs of validation"
    )
    return (
        f"Of {many}, those with the highest loss at step {told.step}: with each picture, how much it is preferred, and "
        "the probability that the reward gives it. A wrong label shows here, too."
    )


def _worst(told: Training) -> str:
    told_pairs = told.kept.get("worst")
    articles = [_pair(told, one) for one in told_pairs or () if isinstance(one, dict)]
    whole = [article for article in articles if article]
    if len(whole) < len(articles):
        told.run.missing.append(f"samples/{step_name(told.step or 0)} ({len(articles) - len(whole)} pairs are damaged)")
    return f'<div class="judged">{"".join(whole)}</div>' if whole else "<p>No pairs were kept.</p>"


def _pair(told: Training, one: Mapping[str, Any]) -> str | None:
    label, said = summary.number(one.get("label_0")), summary.number(one.get("probability_0"))
    files, caption = one.get("files"), str(one.get("caption", ""))
    if label is None or said is None or not isinstance(files, list) or len(files) != 2:
        return None
    figures = ""
    for name, preferred, predicted in zip(files, (label, 1 - label), (said, 1 - said), strict=True):
        path = told.run.directory / "samples" / step_name(told.step or 0) / Path(str(name)).name
        if not path.is_file() or is_huge(path) or not is_whole(path):
            return None
        words = f"preferred {preferred:.0%}, predicted {predicted:.0%}"
        alt = escape(f"{caption}: {words}")
        figures += (
            f'<figure><img class="tile" src="{data_uri(path, 256)}" alt="{alt}" title="{alt}" '
            f'data-file="{file_of(path)}"><figcaption>{words}</figcaption></figure>'
        )
    where = escape(str(one.get("where", "")))
    return f'<article title="{where}"><h3>“{escape(caption)}”</h3><div class="pair">{figures}</div></article>'
