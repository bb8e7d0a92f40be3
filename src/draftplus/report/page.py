"""The page of one run: its numbers, curves and pictures."""

from __future__ import annotations

import importlib.resources
import math
import shlex
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from draftplus import __version__
from draftplus.config import Config, flatten, to_dict
from draftplus.progress import duration
from draftplus.report import summary
from draftplus.report.curves import curves
from draftplus.report.markup import NO_SHARE
from draftplus.report.pictures import before_and_after
from draftplus.report.read import Run
from draftplus.report.wording import method_in_words, setting, show, show_gain


def render(run: Run) -> str:
    """The page as text."""
    files = importlib.resources.files("draftplus.report")
    template = Template((files / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(files / "report.css").read_text(encoding="utf-8"),
        name=escape(run.name),
        method=escape(method_in_words(run.config, run.last_sigma)),
        progress=escape(progress_of(run)),
        missing=missing(run),
        cards=_cards(run),
        rewards=_rewards(run),
        pictures=before_and_after(run),
        charts=curves(run),
        configuration=configuration(run),
        repeat=escape(repeat_command(run)),
        generate=escape(shlex.join(["draftplus", "generate", str(near(run.directory)), "--prompt", _a_prompt(run)])),
        version=escape(__version__),
        script=(files / "pictures.js").read_text(encoding="utf-8"),
    )


def repeat_command(run: Run) -> str:
    """The command that repeats the run under another name."""
    return shlex.join(["draftplus", "train", str(near(run.directory) / "config.yaml"), f"name={run.name}-again"])


def near(path: Path) -> Path:
    """The path as seen from the working directory, where it lies inside."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def _a_prompt(run: Run) -> str:
    return run.prompts[0] if run.prompts else "a cat"


def _planned_steps(run: Run) -> object:
    keys = flatten(run.config)
    return None if keys.get("train.epochs") else keys.get("train.steps")  # epochs, where given, decide


def progress_of(run: Run) -> str:
    planned = _planned_steps(run)
    if not run.steps and not run.running:
        return "No training step is recorded."
    done = int(run.steps[-1]["step"]) if run.steps else 0
    text = f"{done} of {planned} steps" if isinstance(planned, int) and planned != done else f"{done} steps"
    if run.running:
        text = f"Running, step {done}" + (f" of {planned}" if isinstance(planned, int) else "")
    skipped = run.steps[-1].get("skipped") if run.steps else None
    many = "s" * (skipped != 1)
    text += f", {skipped} update{many} skipped because a loss or gradient was not finite" if skipped else ""
    if "step" in run.best:
        rule = f" ({run.best['rule']})" if run.best.get("rule") else ""
        text += f"; best evaluation at step {run.best['step']}{rule}"
    if run.stopped:
        text += (
            f"; ended by a guard at step {run.stopped.get('step', '?')}: {run.stopped.get('reason', 'no reason given')}"
        )
    return f"{text}."


def missing(run: Run) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li>{escape(item)}</li>" for item in run.missing)
    return f'<section class="missing"><h2>Not found in this run directory</h2><ul>{items}</ul></section>'


def _cards(run: Run) -> str:
    cards = [
        card(f"Held-out reward, {change.name}", _arrow(change), _gain(change))
        for change in summary.reward_changes(run)[:2]
    ]
    diversity = summary.diversity_change(run)
    if diversity is not None:
        cards.append(card("Diversity, LPIPS", _arrow(diversity), _ratio(diversity, run)))
    seconds = summary.training_seconds(run)
    if seconds is not None:
        total, median = seconds
        evaluations = summary.evaluation_seconds(run)
        detail = f"{median:.2f} s per step" + (f"; evaluations {duration(evaluations)} more" if evaluations else "")
        cards.append(card("Training time", duration(total), detail))
    return "".join(cards) or "<p>No numbers are recorded yet.</p>"


def card(title: str, value: str, detail: str) -> str:
    return (
        f'<div class="card"><h3>{escape(title)}</h3><p class="value">{escape(value)}</p>'
        f'<p class="detail">{escape(detail)}</p></div>'
    )


def _arrow(change: summary.Change) -> str:
    before = show(change.before, change.after)
    return before if change.after is None else f"{before} → {show(change.after, change.before)}"


def _ratio(change: summary.Change, run: Run) -> str:
    if change.after is None or not change.before or not math.isfinite(change.after / change.before):
        return "one evaluation only" if change.after is None else NO_SHARE if change.before == 0 else "no ratio"
    whose = "the base model's" if run.evaluations[0].step == 0 else "the first evaluation's"
    return f"{change.after / change.before:.0%} of {whose}"


def _gain(change: summary.Change) -> str:
    if change.gain is None:
        return "one evaluation only"
    paired = f"paired gain {show_gain(change.gain, change.error)} over {change.images} images"
    return paired if change.images is not None else f"gain {show_gain(change.gain)}"


def _rewards(run: Run) -> str:
    changes = summary.reward_changes(run)
    if not changes:
        return ""
    optimised = run.config.get("reward")
    rows = "".join(
        "<tr>"
        f'<th scope="row">{escape(change.name)}</th>'
        f"<td>{'optimised' if isinstance(optimised, dict) and change.name in optimised else 'only measured'}</td>"
        f"<td>{show(change.before, change.after)}</td><td>{show(change.after, change.before)}</td>"
        f"<td>{show_gain(change.gain, change.error)}</td><td>{change.images or '–'}</td>"
        "</tr>"
        for change in changes
    )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">reward</th><th scope="col"></th>'
        '<th scope="col">before</th><th scope="col">after</th>'
        '<th scope="col">gain ± standard error over images</th><th scope="col">images</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def configuration(run: Run, schema: Any = Config) -> str:
    """Every key in sections; a value that is not the default's is marked."""
    if not run.config:
        return "<p>No configuration was found.</p>"
    defaults = flatten(to_dict(schema()))

    def row(section: str, key: str, value: Any) -> str:
        kind = "default" if key in defaults and defaults[key] == value else "changed"
        short = key.removeprefix(f"{section}.")
        return f'<tr class="{kind}"><th scope="row">{escape(short)}</th><td>{escape(setting(value))}</td></tr>'

    sections: dict[str, str] = {}
    for key, value in flatten(run.config).items():
        section = key.partition(".")[0] if "." in key else "run"
        sections[section] = sections.get(section, "") + row(section, key, value)
    return "".join(
        f"<table><caption>{escape(section)}</caption><tbody>{rows}</tbody></table>"
        for section, rows in sections.items()
    )
