"""What the comparison shows is what the runs' files say: means over seeds, the Pareto front, names, what is absent."""

import itertools
import json
import math
import os
import re
import shutil
import socket
import warnings
from pathlib import Path

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from draftplus.errors import UserError
from draftplus.report import mosaics, paper, write_report
from draftplus.report.comparison import Report
from draftplus.report.grouping import Mean, comparisons, differing_keys, mean_over
from draftplus.report.inputs import read_inputs
from draftplus.report.looks import ON_PAPER
from draftplus.report.points import BASE, EARLY, Point, figures_of, pareto
from draftplus.runs.files import make_output
from tests.report.page import LOADING, Page
from tests.report.synthetic import BASE as BASE_NUMBERS
from tests.report.synthetic import PROMPTS, configuration, write_run, write_sweep

REWARD = "emoji_clip"


def figures(*paths: Path):
    found = read_inputs(paths)
    (one,) = comparisons(found.runs)
    return figures_of(one, found.targets)


def series_of(told, name: str):
    return next(series for series in told.series if series.name == name)


def last(run: Path) -> dict:
    return json.loads((run / "eval.jsonl").read_text().splitlines()[-1])


def page_of(path: Path, *more: Path) -> Page:
    output = path.parent / "page" / "report.html"
    return Page(write_report([path, *more], output, figures=False).read_text(encoding="utf-8"))


def test_pareto_front_is_what_no_other_beats():
    grid = itertools.product((1.0, 2.0, 3.0, 4.0), (0.1, 0.2, 0.3))
    points = [
        Point("a", f"{r} {d}", {REWARD: Mean(r)}, Mean(d)) for i, (r, d) in enumerate(grid) if i % 5 not in (1, 4)
    ]
    unmeasured = Point("a", "other reward", {"other": Mean(9.0)}, Mean(0.9))

    def beaten(one: Point) -> bool:
        mine = (one.rewards[REWARD].value, one.lpips.value)
        others = [(other.rewards[REWARD].value, other.lpips.value) for other in points]
        return any(o[0] >= mine[0] and o[1] >= mine[1] and o != mine for o in others)

    front = pareto([*points, unmeasured], REWARD)
    assert front and {p.label for p in front} == {p.label for p in points if not beaten(p)}
    assert [p.rewards[REWARD].value for p in front] == sorted(p.rewards[REWARD].value for p in front)


def test_mean_over_seeds_and_its_standard_error():
    assert mean_over([1.0, 2.0, 6.0]) == Mean(3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    assert mean_over([2.0, math.nan]) == Mean(2.0) and mean_over([math.nan]) is None


def test_runs_that_differ_in_their_seed_alone_are_one_point(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", {"seed": seed}, pictures=False) for seed in (0, 1, 2)]
    (point,) = series_of(figures(*runs), "DRaFT-1").points
    rewards, lpips = ([last(run)[key] for run in runs] for key in (f"reward/{REWARD}", "lpips"))
    for mean, values in ((point.rewards[REWARD], rewards), (point.lpips, lpips)):
        assert mean.value == pytest.approx(sum(values) / 3)
        deviations = sum((value - mean.value) ** 2 for value in values)
        assert mean.error == pytest.approx(math.sqrt(deviations / 2 / 3))
    assert {run.name for run in point.runs} == {"s0", "s1", "s2"}


def test_keys_of_watching_and_storing_separate_nothing(tmp_path):
    other = {"seed": 1, "device": "cpu", "checkpoint.every": 5, "log.to": [], "name": "x", "train.micro_batch_size": 4}
    runs = [write_run(tmp_path / "a", pictures=False), write_run(tmp_path / "b", other, pictures=False)]
    found = read_inputs(runs).runs
    assert differing_keys(found) == [] and len(comparisons(found)[0].groups) == 1


PATH = {"objective.kl_steps": "trajectory"}


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "DRaFT-1"),
        ({"objective.grad_steps": 4}, "DRaFT-4"),
        ({"objective.grad_steps": "all"}, "DRaFT"),
        ({"objective.kl_coeff": 0.5}, "DRaFT+, β = 0.5"),
        ({"objective.kl_coeff": 0.5, "objective.grad_steps": 2}, "DRaFT+ (K = 2), β = 0.5"),
        ({"objective.kl_coeff": 2, "objective.kl_space": "x0"}, "DRaFT+ in x0 space, β = 2"),
        ({"objective.method": "draft_lv"}, "DRaFT-LV"),
        ({"objective.method": "ddpo", "optim.lr": 3e-4}, "DDPO"),
        ({"objective.method": "alignprop", "objective.kl_coeff": 1}, "AlignProp with KL, β = 1"),
        ({"objective.gate": 0.5}, "DRaFT-1, gate 0.5"),
        ({"objective.gate": 0.5, "objective.kl_coeff": 3}, "DRaFT+, gate 0.5, β = 3"),
        ({**PATH, "objective.kl_prefix_coeff": 30}, "DRaFT+ on the path, λ = 30"),
        ({**PATH, "objective.kl_prefix_coeff": 30, "objective.kl_coeff": 1}, "DRaFT+ on the path (β = 1), λ = 30"),
        ({**PATH, "objective.kl_coeff": 3}, "DRaFT+ on the whole path, β = 3"),
        ({**PATH, "objective.kl_coeff": 3, "objective.kl_prefix_coeff": 0}, "DRaFT+, β = 3"),
        (
            {**PATH, "objective.kl_coeff": 3, "objective.kl_weights": "noise_level", "objective.gate": 0.25},
            "DRaFT+ on the whole path weighted by noise level, gate 0.25, β = 3",
        ),
        ({**PATH, "objective.method": "refl", "objective.kl_prefix_coeff": 2}, "ReFL with KL on the path, λ = 2"),
        ({"objective.kl_coeff": 2, "objective.kl_space": "velocity"}, "DRaFT+ in velocity space, β = 2"),
    ],
)
def test_methods_are_named_as_the_papers_do(tmp_path, changes, label):
    runs = [write_run(tmp_path / "plain", pictures=False)]
    if changes:
        runs.append(write_run(tmp_path / "other", changes, pictures=False))
    assert label in [group.label for group in comparisons(read_inputs(runs).runs)[0].groups]


def test_what_else_differs_among_runs_of_a_method_is_in_its_name(tmp_path):
    one = write_run(tmp_path / "a", pictures=False)
    two = write_run(tmp_path / "b", {"optim.lr": 0.01}, pictures=False)
    three = write_run(tmp_path / "c", {"reward": {"jpeg": {"weight": 1.0, "path": None, "args": {}}}}, pictures=False)
    four = write_run(tmp_path / "d", {"reward.emoji_clip.args": {"dropout": 0.1}}, pictures=False)
    names = [group.method for group in comparisons(read_inputs([one, two, three, four]).runs)[0].groups]
    assert sorted(names) == sorted(["DRaFT-1", "DRaFT-1, lr 0.01", "DRaFT-1, reward jpeg", "DRaFT-1, dropout 0.1"])


def test_lines_over_the_kl_coefficient_begin_at_the_method_without(tmp_path):
    runs = [write_run(tmp_path / f"kl{kl}", {"objective.kl_coeff": kl}, pictures=False) for kl in (3.0, 0.0, 0.5)]
    line = series_of(figures(*runs), "DRaFT+")
    assert [point.x for point in line.path()] == [0.0, 0.5, 3.0]
    assert line.start is not None and line.start.series == "DRaFT-1"


def test_lines_over_the_coefficient_of_the_path_begin_at_the_method_without_it(tmp_path):
    """Whose own coefficient may be any; others of it are other lines."""
    runs = [
        write_run(
            tmp_path / f"{beta}-{rest}-{gate}",
            {**PATH, "objective.kl_coeff": beta, "objective.kl_prefix_coeff": rest, "objective.gate": gate},
            pictures=False,
        )
        for beta in (0.0, 1.0, 5.0) for rest in (0.0, 10.0, 30.0) for gate in (0.0, 0.5)
    ]  # fmt: skip
    found = figures(*runs)
    for gate in ("", ", gate 0.5"):
        for beta, name, plain in ((0, "DRaFT+ on the path", "DRaFT-1"), (1, "DRaFT+ on the path (β = 1)", "DRaFT+")):
            line = series_of(found, name + gate)
            assert [(point.x, point.symbol) for point in line.points] == [(10, "λ"), (30, "λ")]
            assert line.start is not None and (line.start.series, line.start.x) == (plain + gate, beta)
    text = write_report(runs, tmp_path / "page.html").read_text()
    assert "λ = 30" in text and "KL coefficient β or λ (logarithmic; 0 is the method without)" in text


@pytest.mark.parametrize(
    ("shared", "plain", "with_kl"),
    [
        ({"objective.grad_steps": 2, "objective.kl_space": "x0"}, "DRaFT-2", "DRaFT+ (K = 2) in x0 space"),
        ({"objective.grad_steps": 10}, "DRaFT", "DRaFT+ (K = 10)"),  # all of the ten sampling steps
        ({"objective.method": "alignprop"}, "AlignProp", "AlignProp with KL"),
    ],
)
def test_every_method_with_kl_begins_at_the_same_method_without(tmp_path, shared, plain, with_kl):
    runs = [write_run(tmp_path / f"kl{kl}", {**shared, "objective.kl_coeff": kl}, pictures=False) for kl in (0.0, 2.0)]
    start = series_of(figures(*runs), with_kl).start
    assert start is not None and start.series == plain


def test_a_line_does_not_begin_at_a_run_with_other_settings(tmp_path):
    slow = write_run(tmp_path / "slow", {"optim.lr": 1e-3}, pictures=False)
    fast = write_run(tmp_path / "fast", {"optim.lr": 0.1, "objective.kl_coeff": 2.0}, pictures=False)
    assert series_of(figures(slow, fast), "DRaFT+").start is None


def test_what_tells_groups_apart_is_in_their_names(tmp_path):
    def names(**runs):
        paths = [write_run(tmp_path / name, changes, pictures=False) for name, changes in runs.items()]
        return [group.method for group in comparisons(read_inputs(paths).runs)[0].groups]

    assert names(lora={}, full={"model.lora": None}) == ["DRaFT-1", "DRaFT-1, lora null"]
    drtune = {"objective.method": "drtune"}
    assert len(names(k2={**drtune, "objective.grad_steps": 2}, k5={**drtune, "objective.grad_steps": 5})) == 2
    assert names(s20={"sampler.steps": 20}, t20={"train.steps": 20}) == [
        "DRaFT-1, sampler.steps 10, train.steps 20", "DRaFT-1, train.steps 60",
    ]  # fmt: skip
    assert names(m10={}, m25={"sampler.steps": 25}) == ["DRaFT-1", "DRaFT-1, steps 25"]  # 10 is the model's own
    one, other = ({"reward": {f"a.b:{name}": {"weight": 1.0, "path": None, "args": {}}}} for name in ("one", "other"))
    assert names(one=one, other=other) == ["DRaFT-1, reward a.b:one", "DRaFT-1, reward a.b:other"]


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    first = write_run(tmp_path / "first", pictures=False)
    again = write_run(tmp_path / "again", pictures=False)
    (point,) = series_of(figures(first, again), "DRaFT-1").points
    assert (point.lpips.error, point.lpips.count) == (None, 1)
    assert "again: same settings and seed as another run; not in the averages" in page_of(first, again).text


def test_numbers_that_are_not_finite_leave_a_seed_out_of_all_means(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", {"seed": seed}, pictures=False) for seed in (0, 1, 2)]
    change_rows(runs[0] / "eval.jsonl", lambda row: {**row, "lpips": None} if row["step"] == 0 else row)
    change_rows(runs[1] / "eval.jsonl", lambda row: {**row, "reward/emoji_clip": None} if row["step"] == 60 else row)
    made = figures(*runs)
    assert made.base  # another run has it
    (point,) = series_of(made, "DRaFT-1").points
    assert [run.name for run in point.runs] == ["s0", "s2"] and point.rewards[REWARD].count == point.lpips.count == 2
    assert "s1: its last evaluation has numbers that are not finite" in page_of(*runs).text


def cut(path: Path, before: str) -> None:
    """A configuration as a run writes it, of which only the beginning is there."""
    text = OmegaConf.to_yaml(OmegaConf.load(path))
    path.write_text(text[: text.index(f"\n{before}") + 1])


def change_config(run: Path, **objective) -> None:
    config = json.loads((run / "config.yaml").read_text())
    config["objective"].update(objective)
    (run / "config.yaml").write_text(json.dumps(config))


def middle(path: Path) -> None:
    """Breaks a picture between its first and last bytes."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def change_rows(path: Path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def test_runs_of_one_name_are_told_apart_and_linked_to_their_own_pages(tmp_path):
    for sweep in ("first", "second"):
        run = write_run(tmp_path / sweep / "seed 0 #1", {"optim.lr": 0.1 if sweep == "first" else 0.2}, pictures=False)
        (run / "report.html").write_text("")
    page = page_of(tmp_path / "first", tmp_path / "second")
    assert "first/seed 0 #1" in page.text and "second/seed 0 #1" in page.text
    links = [link for link in page.attributes("href") if link.endswith("report.html")]
    assert [link.partition("/../")[2] for link in links] == [
        f"{sweep}/seed%200%20%231/report.html" for sweep in ("first", "second")
    ]


def test_prompts_in_another_order_are_other_pictures(tmp_path):
    one = write_run(tmp_path / "a", prompts=["an owl", "a crab"], pictures=False)
    other = write_run(tmp_path / "b", {"objective.kl_coeff": 1.0}, prompts=["a crab", "an owl"], pictures=False)
    assert len(comparisons(read_inputs([one, other]).runs)) == 2


def test_many_coefficients_leave_the_other_methods_among_the_pictures(tmp_path):
    runs = [
        write_run(tmp_path / f"kl{kl}", {"objective.kl_coeff": float(kl)}, steps=2, every=2, prompts=["an owl"])
        for kl in range(18)
    ]
    (comparison,) = comparisons(read_inputs(runs).runs)
    labels = [column.label for column in mosaics.columns_of(comparison)]
    assert len(labels) == mosaics.MOST_COLUMNS and {"DRaFT-1", "DRaFT+, β = 1", "DRaFT+, β = 17"} <= set(labels)
    assert "left out of the images side by side" in page_of(*runs).text
    shutil.rmtree(runs[3] / "samples" / "step-000002")
    one = next((runs[2] / "samples" / "step-000002").glob("*.png"))
    for picture in (runs[2] / "samples" / "step-000002").glob("*.png"):
        if picture != one:
            picture.unlink()
    assert len(mosaics.common_pictures(mosaics.columns_of(comparisons(read_inputs(runs).runs)[0]))[0]) == 12


def test_every_mark_over_the_kl_coefficient_has_its_bars(tmp_path):
    runs = [
        write_run(tmp_path / f"kl{kl}-{seed}", {"objective.kl_coeff": kl, "seed": seed}, pictures=False)
        for kl in (0.0, 1.0, 3.0) for seed in (0, 1)
    ]  # fmt: skip
    report = Report(read_inputs(runs).runs, [], [], "x")
    (drawing,) = [d for d in report.comparing(report.sections[0]) if d.name == "diversity-kl"]
    figure = Figure()
    drawing.paint(figure.add_subplot(), ON_PAPER)
    assert sum(isinstance(one, LineCollection) for one in figure.axes[0].collections) == 3


def test_base_model_is_one_point_whatever_the_training_seed(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", {"seed": seed}, pictures=False) for seed in (0, 1)]
    (base,) = figures(*runs).base
    assert (base.rewards[REWARD].value, base.lpips.value) == BASE_NUMBERS and base.series == BASE


def test_earlier_evaluations_of_draft_are_early_stopping(tmp_path):
    run = write_run(tmp_path / "a", steps=40, every=10, pictures=False)
    plus = write_run(tmp_path / "b", {"objective.kl_coeff": 1.0}, steps=40, every=10, pictures=False)
    told = figures(run, plus)
    (early,) = [series for series in told.series if series.kind == EARLY]
    assert early.of == "DRaFT-1" and [point.step for point in early.points] == [10, 20, 30]
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [point.lpips.value for point in early.path()] == [row["lpips"] for row in rows]


def test_variants_are_lines_from_the_base_model_to_the_run(tmp_path):
    told = figures(write_run(tmp_path / "a", variants=True, pictures=False))
    scale = series_of(told, "LoRA scale of DRaFT-1")
    assert [point.x for point in scale.points] == [0.25, 0.5, 0.75]
    assert scale.path()[0] is told.base[0] and scale.path()[-1].lpips.value == last(tmp_path / "a")["lpips"]
    assert len(series_of(told, "AIG of DRaFT-1").points) == 3


def test_runs_of_different_models_or_evaluations_are_never_in_one_figure(tmp_path):
    one = write_run(tmp_path / "a", pictures=False)
    two = write_run(tmp_path / "b", {"model.path": "other/model"}, pictures=False)
    three = write_run(tmp_path / "c", prompts=["a hen"], pictures=False)
    sets = comparisons(read_inputs([one, two, three]).runs)
    assert [[run.name for run in each.runs] for each in sets] == [["a"], ["b"], ["c"]]
    page = page_of(one, two, three)
    assert (
        "never share a figure" in page.text
        and "Model other/model" in page.text
        and "1 held-out prompt (“a hen”)" in page.text
    )


def test_unfinished_runs_are_named_and_kept_out_of_the_averages(tmp_path):
    whole = write_run(tmp_path / "whole", {"seed": 0}, pictures=False)
    part = write_run(tmp_path / "part", {"seed": 1}, done_steps=20, pictures=False)
    (point,) = series_of(figures(whole, part), "DRaFT-1").points
    assert [run.name for run in point.runs] == ["whole"]
    assert "part: not finished: evaluated to step 20 of 60; not in the averages" in page_of(whole, part).text


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml (cannot be read"),
        (lambda run: (run / "config.yaml").unlink(), "left out of the comparison"),
        (lambda run: (run / "eval.jsonl").write_bytes(b"\xff\xfe{"), "eval.jsonl, line 1"),
        (
            lambda run: (run / "eval.jsonl").write_text('{"step": 0, "lpips": "many", "reward/emoji_clip": []}\n'),
            "eval.jsonl, line 1: lpips (not",
        ),
        (lambda run: (run / "eval.jsonl").write_text('{"step": 0}\n[1]\nnull\n'), "eval.jsonl, line 2"),
        (lambda run: (run / "samples" / "prompts.json").write_text("{"), "samples/prompts.json (not JSON)"),
        (lambda run: (run / "best.json").write_text("[3]"), "best.json (not an object)"),
        (lambda run: (run / "stopped.json").write_text("null"), "stopped.json (not an object)"),
        (
            lambda run: change_rows(run / "metrics.jsonl", lambda row: {**row, "step": math.inf}),
            "metrics.jsonl, line 1",
        ),
        (lambda run: change_rows(run / "eval.jsonl", lambda row: {**row, "per_image": [1]}), "line 2: per_image"),
        (lambda run: change_rows(run / "eval.jsonl", lambda row: {**row, "variants": 3}), "line 1: variants"),
        (lambda run: cut(run / "config.yaml", "reward:"), "config.yaml (incomplete: it lacks reward"),
        (lambda run: change_config(run, kl_coeff="x"), "config.yaml (Value 'x'"),
        (lambda run: middle(next(run.glob("samples/step-000002/*.png"))), "(incomplete PNG files)"),
        (lambda run: (run / "best.json").write_text('{"step": '), "best.json (not JSON)"),
        (
            lambda run: [p.write_bytes(b"no picture") for p in run.glob("samples/*/*.png")],
            "and 35 more (incomplete PNG files)",
        ),
        (lambda run: [p.unlink() for p in run.glob("*.jsonl")], "left out of the comparison"),
    ],
)
def test_a_corrupt_run_is_named_and_the_rest_is_drawn(tmp_path, break_it, said):
    good = write_run(tmp_path / "a", steps=4, every=2, prompts=["an owl"])
    bad = write_run(tmp_path / "b", {"objective.kl_coeff": 1.0}, steps=4, every=2, prompts=["an owl"])
    break_it(bad)
    page = page_of(good, bad)
    assert said in page.text and "Diversity against reward" in page.text
    assert "mark" in " ".join(page.attributes("class"))


def test_what_is_missing_is_named_with_what_would_make_it(tmp_path):
    text = page_of(
        write_run(tmp_path / "a", pictures=False), write_run(tmp_path / "b", {"seed": 1}, pictures=False)
    ).text
    assert "Diversity against the KL coefficient: needs one method at two KL coefficients" in text
    assert "Same-seed grids: needs samples/" in text


def test_guards_and_the_best_step_are_marked(tmp_path):
    run = write_run(tmp_path / "a", pictures=False)
    (run / "best.json").write_text(json.dumps({"step": 20, "value": 1.0, "rule": "r"}))
    (run / "stopped.json").write_text(json.dumps({"step": 60, "reason": "diversity fell below 0.8"}))
    other = write_run(tmp_path / "b", {"seed": 1}, pictures=False)
    page = page_of(run, other)
    assert "stopped at step 60: diversity fell below 0.8" in page.text
    assert page.attributes("class").count("flag") == 3  # best and stopped on the reward, stopped on the diversity
    assert "ended by a guard at step 60: diversity fell below 0.8" in Page(write_report(run).read_text()).text


def evaluation(path: Path, prompts=PROMPTS, model="emoji", **changes) -> Path:
    metrics = {
        "reward/emoji_clip": {"mean": 13.5, "standard_error": 0.1, "interval": [13.3, 13.7], "images": 48},
        "lpips": {"mean": 0.31, "standard_error": 0.01, "interval": [0.29, 0.33], "images": 48},
    }
    target = {"target": "runs/a@best", "label": "a@best", "metrics": metrics, **changes}
    told = {"draftplus": "0.1.0", "prompts": prompts, "seeds": list(range(12 * len(prompts)))}
    told |= {"model": [model, None, None, None, "float32"], "targets": [target]}
    path.write_text(json.dumps(told))
    return path


def test_evaluations_are_a_table_and_points(tmp_path):
    run = write_run(tmp_path / "a", pictures=False)
    (tmp_path / "e").mkdir()
    path = evaluation(tmp_path / "e" / "eval.json")
    for given in (path, path.parent):
        (point,) = figures(run, given).series[-1].points
        assert (point.label, point.rewards[REWARD].value, point.lpips.value) == ("a@best", 13.5, 0.31)
    assert "13.50 [13.30, 13.70]" in page_of(run, path).text
    alone = page_of(path, evaluation(tmp_path / "f.json", label="b")).text
    assert "Evaluated models; 4 prompts" in alone and "shown separately" not in alone
    elsewhere = page_of(run, evaluation(tmp_path / "g.json", ["a hen"])).text
    assert "these are shown separately: Model emoji" in elsewhere and "Evaluated models; 1 prompt" in elsewhere
    other = page_of(run, evaluation(tmp_path / "h.json", model="runwayml/sd15")).text
    assert "these are shown separately: Model emoji" in other  # the same prompts, and another model
    few = page_of(run, evaluation(tmp_path / "i.json", metrics={"lpips": {"mean": 0.3}, "vendi": {"mean": None}})).text
    assert "i.json: a@best: vendi not finite" in few and "not what draftplus evaluate writes" not in few
    bad = {"lpips": {"mean": 0.3, "images": '"><img src=x>'}}
    assert "img" not in {tag for tag, _ in page_of(run, evaluation(tmp_path / "j.json", metrics=bad)).tags}
    path.write_text('{"targets": [{"label": 3}]}')
    assert "not what draftplus evaluate writes" in page_of(run, path).text


def test_a_sweep_is_read_from_its_manifest(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", seeds=(0,), pictures=False)
    found = read_inputs([sweep])
    assert len(found.runs) == 10
    assert found.problems[-1].startswith("lr-100: failed: reward 'emoji_clip' is not finite")
    assert len(read_inputs([sweep, sweep, sweep / found.runs[0].name]).runs) == 10  # each run once
    (sweep / "manifest.json").write_text("{")
    found = read_inputs([sweep])
    assert len(found.runs) == 10 and "not a sweep's manifest" in found.problems[0]


def test_nothing_to_report_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no runs found"):
        write_report([tmp_path, tmp_path])
    with pytest.raises(UserError, match="gone: no such run directory, sweep"):
        write_report(tmp_path / "gone")
    run = write_run(tmp_path / "a", pictures=False)
    with pytest.raises(UserError, match="is a directory"):
        write_report([run, run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run, run], tmp_path / "file" / "report.html", figures=False)


def test_the_page_stands_alone_and_is_well_formed(tmp_path):
    prompts = ["a <b>'\"&", "$\\frac$ x"]
    runs = [
        write_run(tmp_path / f"r{kl}", {"objective.kl_coeff": kl}, steps=4, every=2, prompts=prompts)
        for kl in (0.0, 1.0)
    ]
    hostile = tmp_path / "<!--<script><i>${name}</script>".replace("/", "∕")
    runs.append(write_run(hostile, {"seed": 3}, steps=4, every=2, prompts=prompts))
    path = write_report(runs, tmp_path / "report.html")  # with its figures, whose text is not TeX
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    addresses = [value for name in LOADING for value in page.attributes(name)]
    assert addresses and all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org)", html)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) and not {"i", "b"} & {tag for tag, _ in page.tags}
    referenced = {value[1:] for value in page.attributes("href")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert referenced <= set(ids)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert hostile.name in [run["name"] for run in data["runs"]]
    assert "<!--" not in html.split('id="data">')[1].split("</script>")[0]  # nor anything else that HTML reads there


@pytest.mark.slow
def test_figures_are_written_beside_the_page(tmp_path):
    for kl in (0.0, 1.0):
        write_run(tmp_path / "runs" / f"{kl}", {"objective.kl_coeff": kl}, steps=4, every=2, prompts=["an owl"])
    write_report(tmp_path / "runs", tmp_path / "out" / "report.html")
    names = {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert names == {path.stem for path in (tmp_path / "out" / "figures").glob("*.svg")}
    assert {"trade-off", "diversity-kl", "reward-kl", "same-seed-0", "base-against-tuned", "training-lpips"} <= names
    shutil.rmtree(tmp_path / "out")
    write_report(tmp_path / "runs" / "0.0", tmp_path / "out" / "report.html", figures=True)  # of one run, too
    assert {"base-against-tuned", "training-reward"} <= {path.stem for path in (tmp_path / "out/figures").glob("*.png")}


def test_synthetic_configurations_are_complete():
    assert configuration([], {"objective.kl_coeff": 2.0})["objective"]["kl_coeff"] == 2.0


def test_letters_that_no_font_has_are_written_out(tmp_path, monkeypatch):
    for kl in (0.0, 1.0):
        write_run(tmp_path / "runs" / f"{kl:g}", {"objective.kl_coeff": kl}, prompts=["一只猫", "an owl"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that it draws as a box
        page = write_report(tmp_path / "runs", tmp_path / "report.html")
    assert "“一只猫”" in Page(page.read_text()).text
    assert "一只猫" in (tmp_path / "figures" / "same-seed-0.svg").read_text()
    for told in (paper.families, paper._letters):
        told.cache_clear()
    monkeypatch.setattr(paper, "FALLBACKS", ())
    assert paper.legible("“一只猫” β −") == "“\\u4e00\\u53ea\\u732b” β −"
    for told in (paper.families, paper._letters):
        told.cache_clear()
    monkeypatch.setattr(paper, "FALLBACKS", ("no such font", "STIXGeneral"))
    assert paper.families() == ["sans-serif", "STIXGeneral"] and paper.legible("\u1d81一") == "\u1d81\\u4e00"
    for told in (paper.families, paper._letters):
        told.cache_clear()


def test_figures_of_an_earlier_report_are_removed(tmp_path):
    runs = [write_run(tmp_path / "runs" / str(kl), {"objective.kl_coeff": kl}, pictures=False) for kl in (0.0, 1.0)]
    write_report(tmp_path / "runs", tmp_path / "report.html")
    (tmp_path / "figures" / "mine.png").touch()
    assert (tmp_path / "figures" / "diversity-kl.png").is_file()
    shutil.rmtree(runs[1])
    write_report(tmp_path / "runs", tmp_path / "report.html")
    left = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "mine.png" in left and "trade-off.svg" in left and "diversity-kl.png" not in left


ODD = [0.0, math.nan, math.inf, -1.0, 1e308, 10**25]


@pytest.mark.parametrize("value", ODD, ids=str)
def test_numbers_that_no_run_should_have_are_drawn_or_left_out(tmp_path, value):
    """0 is what the base model's diversity is where all its images are one; a page divided by it."""
    for at in ("base", "last"):
        runs = tmp_path / at
        for kl in (0.0, 1.0):
            run = write_run(runs / f"{kl:g}", {"objective.kl_coeff": kl}, steps=2, every=1, pictures=False)
            rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
            for row in [row for row in rows if (row["step"] == 0) == (at == "base")]:
                row.update({"lpips": value} if value == 0 else {"lpips": value, f"reward/{REWARD}": value})
            (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            told = "".join(json.dumps({**row, "reward": value, "kl": value, "seconds": value}) + "\n" for row in steps)
            (run / "metrics.jsonl").write_text(told)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            text = page_of(runs).text
            alone = Page(write_report(runs / "0", tmp_path / "alone.html").read_text(encoding="utf-8")).text
        if value == 0.0 and at == "base":
            assert "no share of the base model's, which is 0" in text and "no share of" in alone


def test_only_files_and_directories_are_written_to(tmp_path, monkeypatch):
    """As root, `report -o /dev/null` replaced the device by a page."""
    run = write_run(tmp_path / "run", pictures=False)
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    listening.bind("socket")
    places = [tmp_path / "pipe", tmp_path / "socket", Path("/dev/null")]
    for i, place in enumerate(places[:]):
        (tmp_path / f"link{i}").symlink_to(place)
        places.append(tmp_path / f"link{i}")
    for place in places:
        before = place.lstat().st_mode
        with pytest.raises(UserError, match="is a device, pipe or socket; give the name of a file"):
            write_report(run, place)
        with pytest.raises(UserError, match=r"cannot be created.*name another output directory"):
            make_output(place)
        assert place.lstat().st_mode == before
    listening.close()
    (tmp_path / "page.html").write_text("old")
    assert "<html" in write_report(run, tmp_path / "page.html").read_text()
