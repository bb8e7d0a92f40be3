"""The page that compares runs, and its figures as files."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from draftplus import __version__
from draftplus.report import figures, mosaics, paper, summary, tables
from draftplus.report.drawing import Drawing, Numbering, figure_name
from draftplus.report.figures import Curve
from draftplus.report.grouping import Comparison, differing_keys
from draftplus.report.inputs import Evaluated
from draftplus.report.looks import looks_of, spare_look
from draftplus.report.markup import cards, chips, figure_block, missing_block, problems_block
from draftplus.report.points import BASE, Point, seeds_told
from draftplus.report.read import Run
from draftplus.report.rings import NOTES, numbers_of, ring_note, rings
from draftplus.report.sections import Section, notes, sections_of, summary_line
from draftplus.report.wording import show
from draftplus.runs.rows import reward_key, reward_names

MOST_SHEETS = 240  # points with pictures on hover, so that the page of a large sweep stays light
MOST_VERTICES = 150  # of one curve


class Report:
    """What the page and the figure files are both made from.

    runs, targets, problems: as `read_inputs` gives them. title: the page's heading.
    """

    def __init__(self, runs: Sequence[Run], targets: Sequence[Evaluated], problems: Sequence[str], title: str) -> None:
        self.runs, self.targets, self.problems, self.title = list(runs), list(targets), list(problems), title
        self.sections = sections_of(runs, targets)
        names = dict.fromkeys([BASE, *(s.name for section in self.sections for s in section.figures.series)])
        names.update(dict.fromkeys(group.method for section in self.sections for group in section.comparison.groups))
        self.series = {name: i for i, name in enumerate(names)}
        distinct = {s.name: s for section in self.sections for s in section.figures.series}
        self.looks = looks_of(list(distinct.values()))
        self.shown = {name: series.shown for name, series in distinct.items()}
        self.points = [point for section in self.sections for point in section.figures.points()]
        keys = [(section.comparison.runs, differing_keys(section.comparison.runs)) for section in self.sections]
        self.differing = {id(run): told for runs, told in keys for run in runs}
        self.numbering = Numbering(self.series, {id(point): i for i, point in enumerate(self.points)})
        self.run_numbers = {id(run): i for i, run in enumerate(self.runs)}
        self.methods = {
            id(run): group.method
            for section in self.sections
            for group in section.comparison.groups
            for run in [*group.runs, *group.short, *group.copies]
        }
        for method in self.methods.values():  # one that has no point yet is still a line among the training curves
            self.looks.setdefault(method, spare_look(len(self.looks)))

    def save(self, directory: Path) -> list[Path]:
        """Writes every figure whose inputs exist as PNG and SVG, in the place of older ones, and returns the paths."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for section in self.sections:
            for drawing in [*self.comparing(section), *self.curves(section)]:
                named = Drawing(**{**vars(drawing), "name": f"{section.prefix}{drawing.name}"})
                paths += named.save(directory)
            columns, prompts = mosaics.columns_of(section.comparison), _prompts(section.comparison)
            common = list(mosaics.common_pictures(columns))
            if len(columns) > 1 and common:
                for prompt in common[: mosaics.MOST_PROMPTS]:
                    name = f"{section.prefix}same-seed-{prompt}"
                    paths += mosaics.save_grid(columns, prompts, prompt, directory, name)
                paths += mosaics.save_many(columns, prompts, directory, f"{section.prefix}base-against-tuned")
        paper.remove_stale(directory, paths)
        return paths

    def comparing(self, section: Section) -> Iterator[Drawing]:
        """The trade-off of each reward, and both against the KL coefficient."""
        told = section.figures
        for reward in told.rewards:
            if sum(point.reward(reward) is not None for point in told.points()) > 1:
                yield figures.trade_off(told, reward, self.looks, self.numbering)
        for which in (None, *told.rewards):
            drawing = figures.against_kl(told, which, self.looks, self.numbering)
            if drawing is not None:
                yield drawing

    def curves(self, section: Section) -> Iterator[Drawing]:
        """The training curves of all runs, one figure for each quantity."""
        for name, (title, unit, _, curves) in self.curve_data(section).items():
            yield figures.training(name, title, unit, curves, self.looks, self.series)

    def curve_data(self, section: Section) -> dict[str, tuple[str, str, str, list[Curve]]]:
        """By quantity: title, unit of the axis, what it means, and the curve of each run that has it."""
        wanted = [("reward", "Training reward", "reward", "the weighted sum that is optimised, smoothed", False)]
        wanted += [
            (reward_key(name), f"Held-out reward, {name}", "reward", "on prompts that are never used in training", True)
            for name in section.figures.rewards
        ]
        wanted += [
            ("kl", "KL", "mean squared difference", "distance from the frozen model, smoothed", False),
            ("lpips", "Diversity", "LPIPS", "mean pairwise LPIPS of one prompt's images", True),
        ]
        told = {}
        for key, title, unit, note, held_out in wanted:
            curves = [curve for run in section.comparison.runs if (curve := self._curve(run, key, held_out))]
            if curves and not (key == "kl" and not any(any(curve.values) for curve in curves)):
                name = figure_name(f"{'held-out' if held_out and key != 'lpips' else ''} {key}")
                told[name] = (title, unit, note, curves)
        return told

    def _curve(self, run: Run, key: str, held_out: bool) -> Curve | None:
        reward = next(iter(reward_names([key])), None)
        steps, values = summary.held_out_series(run, reward) if held_out else summary.series(run, key)
        if not held_out:
            width = max(5, len(values) // 10)
            values = summary.smooth(values, width) if len(values) >= 2 * width else values
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if not kept:
            return None
        if not held_out:
            kept = [kept[i] for i in figures.thinned(kept, max(20, min(MOST_VERTICES, 10_000 // len(self.runs))))]
        flags: list[tuple[int, float, str]] = []
        if held_out:
            best = [(s, v, "*") for s, v in kept if s == run.best.get("step") != kept[-1][0]]
            flags = [*(best if key != "lpips" else []), *([(*kept[-1], "x")] if run.stopped else [])]
        steps, values = [step for step, _ in kept], [value for _, value in kept]
        return Curve(self.run_numbers[id(run)], self.methods[id(run)], steps, values, held_out, flags)

    def render(self, directory: Path) -> str:
        """The page as text; it links to the runs as seen from `directory`."""
        files = importlib.resources.files("draftplus.report")
        curves: dict[str, Any] = {}
        sections = "".join(self._section(section, curves, directory) for section in self.sections)
        data = {
            "series": [{"name": name, "shown": self.shown.get(name, True)} for name in self.series],
            "points": [self._told(i, point) for i, point in enumerate(self.points)],
            "runs": [
                {"name": run.name, "series": self.series[self.methods[id(run)]], "text": self._search(run),
                 "method": self.methods[id(run)]}
                for run in self.runs
            ],
            "curves": curves,
            "notes": NOTES,
        }  # fmt: skip
        return Template((files / "comparison.html").read_text(encoding="utf-8")).substitute(
            style=(files / "report.css").read_text(encoding="utf-8"),
            script=(files / "comparison.js").read_text(encoding="utf-8"),
            viewer=(files / "pictures.js").read_text(encoding="utf-8"),
            data=json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
            name=escape(self.title),
            summary=escape(summary_line(self.runs, self.targets, self.sections)),
            problems=problems_block(self.problems + notes(self.sections)),
            chips=chips(self.looks, self.series, self.shown),
            sections=sections,
            version=escape(__version__),
        )

    def pages(self, directory: Path) -> dict[int, str]:
        """The address of each run's own page, where it has one, as seen from `directory`; by id()."""
        told = {id(run): _page_of(run, directory) for run in self.runs}
        return {number: page for number, page in told.items() if page is not None}

    def _search(self, run: Run) -> str:
        return tables.search_text(run, self.differing[id(run)])

    def _told(self, number: int, point: Point) -> dict[str, Any]:
        rows = []
        for name, mean in point.rewards.items():
            rows.append(
                [f"reward {name}", show(mean.value) + (f" ± {show(mean.error, mean.value)}" if mean.error else "")]
            )
        lpips = point.lpips
        rows.append(["LPIPS", show(lpips.value) + (f" ± {show(lpips.error, lpips.value)}" if lpips.error else "")])
        if point.series != BASE and point.runs:
            rows.append(["runs", ", ".join(run.name for run in point.runs[:4]) + (" …" if len(point.runs) > 4 else "")])
            rows.append(["over", seeds_told(point)])
        if point.source:
            rows.append(["from", point.source])
        sheet = None
        pictured = next((run for run in point.runs if point.step in run.samples), None)
        if pictured is not None and point.step is not None and number < MOST_SHEETS:
            sheet = mosaics.contact_sheet(pictured, point.step)
        told = {"series": self.series[point.series], "label": point.label, "rows": rows, "picture": sheet}
        return {**told, **numbers_of(point)}

    def _section(self, section: Section, curves: dict[str, Any], directory: Path) -> str:
        parts = [f"<h2>{escape(section.comparison.title)}</h2>"] if len(self.sections) > 1 else []
        missing: list[tuple[str, str]] = []
        drawings = list(self.comparing(section))
        parts.append(cards(section.figures))
        parts += self._drawn(section, drawings, missing)
        parts += self._pictures(section, missing)
        told = []
        for name, (title, unit, note, lines) in self.curve_data(section).items():
            drawing = figures.training(name, title, unit, lines, self.looks, self.series)
            prefix = f"{section.prefix}{drawing.name}"
            curves[prefix] = {line.run: [list(line.steps), [float(f"{v:.5g}") for v in line.values]] for line in lines}
            caption = f"<strong>{escape(title)}</strong> {escape(note[0].upper() + note[1:])}."
            told.append(figure_block(drawing.element(f"c{prefix}"), caption, "curve", f' data-curves="{prefix}"'))
        if told:
            parts.append(
                "<section><h2>Training curves</h2><p>Each line is a run, coloured by its method. "
                "★ marks the best evaluation if it is not the last, × where a guard ended the run.</p>"
                f'<div class="charts">{"".join(told)}</div></section>'
            )
        if not told:
            missing.append(("training curves", "needs runs with metrics.jsonl or eval.jsonl: draftplus train"))
        if section.comparison.runs:
            series_of = {id(run): self.series[self.methods[id(run)]] for run in section.comparison.runs}
            table = tables.runs_table(section.comparison, section.figures.rewards, series_of, self.pages(directory))
            parts.append(
                "<section><h2>Settings and results</h2><p>Each row is a run. Click on a heading to sort.</p>"
                f"{table}</section>"
            )
        if self.targets and section is self.sections[-1]:
            parts.append(
                "<section><h2>Evaluated models</h2><p>From <code>draftplus evaluate</code>; 95% intervals in "
                f"brackets.</p>{tables.evaluations_table(self.targets)}</section>"
            )
        parts.append(missing_block(missing))
        return "".join(parts)

    def _drawn(self, section: Section, drawings: Sequence[Drawing], missing: list[tuple[str, str]]) -> Iterator[str]:
        offs = [d for d in drawings if d.name.startswith("trade-off")]
        kls = [d for d in drawings if not d.name.startswith("trade-off")]
        if offs:
            blocks = "".join(_trade_off(section, d) for d in offs)
            yield (
                "<section><h2>The trade-off</h2><p>Higher is more diverse and further right is a higher reward, so "
                "the best place is the upper right. Each line is a method; its marks are its settings. Dashed lines "
                "need no further training: stopping early, scaling the LoRA, or annealing from the base model. Bars "
                "are one standard error of the mean over training seeds; a mark without bars is a single run. Rings "
                "are the Pareto front: no other mark beats these in both, and by more than one standard error."
                f"</p>{blocks}</section>"
            )
        else:
            missing.append(("trade-off", "needs eval.jsonl with a reward and LPIPS of two settings or more"))
        if kls:
            blocks = "".join(
                figure_block(d.element(f"c{section.prefix}{d.name}"), f"<strong>{escape(d.title)}</strong>", "")
                for d in kls
            )
            yield (
                "<section><h2>What the KL coefficient does</h2><p>From left to right the model is kept closer to the "
                "base model, whose value is the dashed line. Bars are one standard error over training seeds.</p>"
                f'<div class="charts">{blocks}</div></section>'
            )
        else:
            told = "needs one method at two KL coefficients or more: draftplus sweep emoji objective.kl_coeff=0,1,10"
            missing += [("diversity against the KL coefficient", told), ("reward against the KL coefficient", told)]

    def _pictures(self, section: Section, missing: list[tuple[str, str]]) -> Iterator[str]:
        columns, prompts = mosaics.columns_of(section.comparison), _prompts(section.comparison)
        common = mosaics.common_pictures(columns)
        if len(columns) < 2 or not common:
            why = "needs samples/ of the same prompts and seeds, at step 0 and after training"
            missing += [("same-seed grids", why), ("base model and tuned models", why)]
            return
        shown = list(common)[: mosaics.MOST_PROMPTS]
        options = "".join(
            f'<option value="{n}">{escape(prompts[p] if p < len(prompts) else f"prompt {p}")}</option>'
            for n, p in enumerate(shown)
        )
        yield (
            '<section class="grids"><h2>The same noise, by method</h2><p>Each row is a seed, and all its images start '
            "from the same noise. The columns are the base model, the methods with a KL term, from strong to weak, and "
            "then those without one.</p>"
            f'<p><label>Prompt <select class="prompts">{options}</select></label></p>'
            f"{mosaics.same_seed_grids(columns, prompts, self.series)}</section>"
            "<section><h2>Base model and tuned models</h2><p>Each column is a prompt and seed, each row a model.</p>"
            f"{mosaics.many_prompts(columns, prompts, self.series)}</section>"
        )


def _trade_off(section: Section, drawing: Drawing) -> str:
    assert drawing.reward is not None
    note = ring_note(rings(section.figures.shown(), drawing.reward))
    caption = f'<strong>{escape(drawing.title)}</strong> <span class="note" role="status">{escape(note)}</span>'
    svg = drawing.element(f"c{section.prefix}{drawing.name}")
    return figure_block(svg, caption, "large", f' data-reward="{escape(drawing.reward)}"')


def _prompts(comparison: Comparison) -> list[str]:
    return next((run.prompts for run in comparison.runs if run.prompts), [])


def _page_of(run: Run, directory: Path) -> str | None:
    page = run.directory / "report.html"
    if not page.is_file():
        return None
    return "./" + quote(Path(os.path.relpath(page.resolve(), directory.resolve())).as_posix())
