"""The study's curves on numbers whose answer is known, its queue, and what it packs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

import draftplus
from benchmarks.study.__main__ import main
from benchmarks.study.curves import (
    Curve,
    at_gain,
    bootstrap,
    compared,
    difference_of,
    each_seed,
    estimate,
    joined,
    scatter,
)
from benchmarks.study.figure import figure_of
from benchmarks.study.packing import pack, unpack
from benchmarks.study.plan import DONE, Plan, Setting, Task, read_plan, seeds_of, tasks_of
from benchmarks.study.pool import Durations, run_queue
from benchmarks.study.reading import Study, read_study
from benchmarks.study.tables import (
    GAINS,
    against,
    beside_early,
    chosen_apart,
    coefficients,
    percent_at,
    rivals,
    sections,
    summary,
)
from benchmarks.study.train import METRICS, train
from draftplus.runs.journal import read_rows
from draftplus.runs.plan import plan_run
from tests.benchmarks.study_jobs import leave_a_mark, take_long
from tests.report.synthetic import PROMPTS, write_run

BASE = {"reward": np.full((1, 4), 10.0), "lpips": np.full((1, 4), 0.4)}


def curve(*points: tuple[float, float], seeds: int = 3) -> Curve:
    """A curve through (gain, LPIPS), the same in every seed and prompt."""
    told = [{"reward": np.full((seeds, 4), 10 + gain), "lpips": np.full((seeds, 4), lpips)} for gain, lpips in points]
    return Curve("", tuple(range(seeds)), tuple(told))


@pytest.mark.parametrize(
    ("gain", "kept"), [(0.5, 0.375), (1, 0.35), (1.5, 0.325), (2, 0.3), (2.5, 0.21), (3, 0.15), (3.1, np.nan)]
)
def test_diversity_is_interpolated_where_a_gain_is_reached_first(gain: float, kept: float) -> None:
    back_and_on = curve((2, 0.3), (1, 0.39), (3, 0.15))  # passes a gain of 1 three times, once with more diversity
    for drawn in (each_seed(3, 4), bootstrap(3, 4, 20)):
        np.testing.assert_allclose(at_gain(back_and_on, gain, BASE, "reward", "lpips", drawn)[:1], kept)


def test_a_bootstrap_draws_whole_seeds_and_prompts_one_fewer_than_there_are() -> None:
    drawn = bootstrap(5, 7, 300)
    assert (drawn.seeds[0] == 1).all() and (drawn.prompts[0] == 1).all()
    assert (drawn.seeds[1:].sum(1) == 4).all() and (drawn.prompts[1:].sum(1) == 6).all()
    assert drawn.seeds[1:].max() > 1 and drawn.seeds[1:].min() == 0
    values = np.random.default_rng(0).normal(size=(5, 7))
    rows, columns = (np.repeat(np.arange(n), counts[3].astype(int)) for n, counts in
                     ((5, drawn.seeds), (7, drawn.prompts)))  # fmt: skip
    np.testing.assert_allclose(drawn.mean(values)[3], values[np.ix_(rows, columns)].mean())
    np.testing.assert_allclose(drawn.mean(values)[0], values.mean())
    np.testing.assert_allclose(drawn.mean(values[:1])[3], values[0, columns].mean())


def test_an_interval_over_one_of_both_has_all_of_the_other_and_is_as_wide_as_that_one_scatters() -> None:
    both, seeds, prompts = (bootstrap(5, 7, 300, over) for over in ("both", "seeds", "prompts"))
    assert (seeds.prompts == 1).all() and (prompts.seeds == 1).all()
    np.testing.assert_array_equal(seeds.seeds, both.seeds)
    np.testing.assert_array_equal(prompts.prompts, both.prompts)
    values = np.arange(5.0)[:, None] + np.zeros((5, 7))  # seeds differ, prompts do not
    assert np.ptp(prompts.mean(values)) == 0 < np.ptp(seeds.mean(values))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator, held, rounds = np.random.default_rng(1), 0, 200
    drawn = bootstrap(8, 15)
    for _ in range(rounds):
        values = generator.normal(0, 1, (8, 1)) + generator.normal(0, 1, (1, 15)) + generator.normal(0, 0.5, (8, 15))
        told = estimate(drawn.mean(values))
        assert told is not None
        held += told.low <= 0 <= told.high
    assert 0.88 * rounds <= held <= rounds


def noisy(drop: float, fastest: float = 2.0, seeds: int = 6, prompts: int = 9) -> tuple[Curve, dict[str, np.ndarray]]:
    """A curve that loses `drop` of LPIPS for each point of gain, whatever the seed and the prompt; seed 0 gains a
    quarter as much as the others."""
    generator = np.random.default_rng(2)
    ease = generator.normal(0, 0.02, (1, prompts))
    base = {"reward": generator.normal(12, 1, (1, prompts)), "lpips": 0.35 + ease}
    speed = np.linspace(0.9, 1.1, seeds)[:, None] * fastest
    speed[0] /= 4
    points = []
    for done in (0.3, 0.6, 1.0):
        gain = speed * done * np.ones((1, prompts))
        points.append({"reward": base["reward"] + gain, "lpips": base["lpips"] - drop * gain})
    return Curve("noisy", tuple(range(seeds)), tuple(points)), base


def test_a_difference_is_paired_so_that_what_curves_share_has_no_part_in_its_interval() -> None:
    (slow, base), (fast, _) = noisy(0.02, 1.6), noisy(0.05)

    def kept(one: Curve, drawn: object) -> np.ndarray:
        return at_gain(one, 1.0, base, "reward", "lpips", drawn)  # type: ignore[arg-type]

    told = compared(slow, fast, difference_of(kept), 9)
    assert told.difference is not None
    np.testing.assert_allclose([told.difference.value, told.difference.low, told.difference.high], 0.03, atol=1e-12)
    assert (told.holds, told.reached, told.seeds) == (5, 5, 6)  # seed 0 never gains so much alone
    back = compared(fast, slow, difference_of(kept), 9)
    assert back.difference is not None and back.difference.value == pytest.approx(-0.03) and back.holds == 0
    alone = kept(fast, bootstrap(6, 9))  # by itself it depends on which prompts were drawn
    assert np.nanstd(alone) > 1e-3 and told.difference.share == pytest.approx((~np.isnan(alone[1:])).mean(), abs=0.1)


def test_what_is_never_reached_is_said_with_the_draws_in_which_it_is() -> None:
    one, base = noisy(0.05)
    values = at_gain(one, 1.7, base, "reward", "lpips", bootstrap(6, 9))  # of the mean over seeds, at most 1.75
    told = estimate(values)
    assert told is not None and 0.2 < told.share < 0.9 and "% of draws" in told.told()
    assert estimate(at_gain(one, 3, base, "reward", "lpips", bootstrap(6, 9))) is None


def test_curves_are_compared_in_the_seeds_that_both_have() -> None:
    one, base = noisy(0.05)
    other = one.of([4, 2])

    def kept(which: Curve, drawn: object) -> np.ndarray:
        return at_gain(which, 1.0, base, "reward", "lpips", drawn)  # type: ignore[arg-type]

    told = compared(one, other, difference_of(kept), 9)
    assert told.seeds == 2 and told.difference is not None and told.difference.value == 0
    assert compared(one.of([1]), other, difference_of(kept), 9).told() == "–"
    line = joined("line", [one, other])
    assert line.seeds == (2, 4) and len(line.points) == 2
    np.testing.assert_array_equal(line.points[0]["reward"], one.points[-1]["reward"][[2, 4]])


def test_a_line_over_settings_has_no_number_below_what_its_first_setting_gains() -> None:
    line = joined("line", [curve((0.5, 0.39), (1, 0.38)), curve((2, 0.3))])
    told = [at_gain(line, gain, BASE, "reward", "lpips", each_seed(3, 4))[0] for gain in (0.5, 1.5)]
    assert np.isnan(told[0]) and told[1] == pytest.approx(0.34)


def test_scatter_is_the_deviation_over_seeds_that_have_a_number() -> None:
    assert scatter(np.array([1.0, np.nan, 3.0])) == pytest.approx(2**0.5)
    assert np.isnan(scatter(np.array([1.0, np.nan])))


def measured() -> Study:
    """A setting that loses 0.05 of LPIPS for each point of gain, and one that loses 0.02 and gains less."""
    (fast, base), (slow, _) = noisy(0.05), noisy(0.02, 1.2)
    curves = {"fast": replace(fast, label="fast"), "slow": replace(slow, label="slow")}
    settings = {name: Setting(name, name, {}) for name in curves}
    plan = Plan("emoji", "reward", settings, {}, early="fast", lines={"line": ["slow", "fast"]})
    steps = {name: [1, 2, 3] for name in curves}
    return Study(plan, base, [str(i) for i in range(9)], curves, steps, {}, {}, dict.fromkeys(curves, 1.0))


def test_the_tables_tell_differences_that_are_known() -> None:
    made = measured()
    whole = 100 / made.base["lpips"].mean()
    early = rivals(made)[0]
    cells = {row.split(" | ")[0]: row.split(" | ")[1:] for row in summary(made, early).splitlines()}["| slow"]
    for gain, cell in zip(GAINS, cells, strict=True):
        if gain < 1.05:  # the most that the slow one gains in the mean over seeds
            assert cell.startswith(f"+{0.03 * gain * whole:.1f} (+"), (gain, cell)
        else:
            assert cell.startswith("– (both in")
    assert cells[0].endswith("5 of 5 seeds")  # seed 0 of the slow one never gains half a point
    gained = made.curves["slow"].points[-1]["reward"].mean() - made.base["reward"].mean()
    (row,) = [row for row in beside_early(made).splitlines() if row.startswith("| slow")]
    assert row.startswith(f"| slow | +{0.03 * gained * whole:.1f} (+")  # where the fast one had gained as much
    ends = [made.curves[name].points[-1] for name in ("fast", "slow")]
    lpips, reward = (float(ends[1][name].mean() - ends[0][name].mean()) for name in ("lpips", "reward"))
    (row,) = [row for row in coefficients(made).splitlines() if row.startswith("| fast → slow")]
    assert f"| +{whole * lpips:.1f} (+" in row and f"| −{-reward:.2f} (−" in row and row.endswith("0 of 6 seeds |")


def small(tmp_path: Path, settings: dict[str, dict[str, object]], seeds: int = 2, device: str = "cpu") -> list[Task]:
    plan = Plan("emoji", "emoji_clip", {name: Setting(name, name, keys) for name, keys in settings.items()}, {})
    return tasks_of(plan, tmp_path / "runs", range(seeds), device)


def names(tasks: list[Task]) -> list[str]:
    return [f"{task.setting}{task.seed}" for task in tasks]


def marks(task: Task) -> list[str]:
    path = task.run / "mark"
    return path.read_text().splitlines() if path.is_file() else []


def test_the_queue_goes_seed_by_seed_in_one_process_and_skips_what_is_finished(tmp_path: Path) -> None:
    tasks = small(tmp_path, {"a": {}, "b": {"do": "raise"}, "c": {}})
    assert names(tasks) == ["a0", "b0", "c0", "a1", "b1", "c1"]
    said = list[str]()
    first = run_queue(tasks, leave_a_mark, 1, tmp_path / "logs", tell=said.append)
    assert names(first.done) == ["a0", "c0", "a1", "c1"] and not first.left and not first.stopped
    assert first.failed.keys() == {"b seed 0", "b seed 1"} and "ValueError: not this one" in first.failed["b seed 0"]
    assert len({line for task in tasks for line in marks(task)}) == 1  # one process for all
    assert "Traceback" in (tmp_path / "logs" / "worker-0.txt").read_text()
    again = run_queue(small(tmp_path, {"a": {}, "c": {"new": 1}}), leave_a_mark, 2, tmp_path / "logs", tell=said.append)
    assert names(again.skipped) == ["a0", "a1"]
    assert sorted(names(again.done)) == [
        "c0",
        "c1",
    ]  # of other keys they are not finished; two processes end as they may
    assert [len(marks(task)) for task in tasks] == [1, 1, 2, 1, 1, 2]


def test_a_process_that_dies_takes_no_other_run_with_it(tmp_path: Path) -> None:
    tasks = small(tmp_path, {"a": {}, "b": {"do": "die"}, "c": {}}, seeds=1)
    told = run_queue(tasks, leave_a_mark, 1, tmp_path / "logs", tell=lambda line: None)
    assert names(told.done) == ["a0", "c0"] and "status 7" in told.failed["b seed 0"]


def test_when_time_is_over_what_is_in_flight_is_interrupted_and_continued_by_the_next_call(tmp_path: Path) -> None:
    tasks = small(tmp_path, {"a": {}, "b": {}}, seeds=1)
    began = time.monotonic()
    told = run_queue(tasks, take_long, 1, tmp_path / "logs", until=5, tell=lambda line: None)
    assert 5 <= time.monotonic() - began < 9
    assert names(told.stopped) == ["a0"] and names(told.left) == ["b0"] and not told.failed and not told.done
    told = run_queue(tasks[:1], take_long, 1, tmp_path / "logs", tell=lambda line: None)
    assert names(told.done) == ["a0"]


def test_no_process_stays_behind_where_the_command_is_ended(tmp_path: Path) -> None:
    def tell(line: str) -> None:
        if "seed 0 in" in line:
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        run_queue(small(tmp_path, {"a": {}, "b": {}}), leave_a_mark, 2, tmp_path / "logs", tell=tell)
    assert not active_children()


def test_no_run_starts_that_is_expected_to_end_too_late(tmp_path: Path) -> None:
    tasks = small(tmp_path, {"a": {}, "b": {}, "c": {}})
    for task, seconds in zip(tasks[:2], (1000, 0.1), strict=True):
        task.run.mkdir(parents=True)
        task.finish(seconds)
    known = Durations(tasks)
    assert [known.expected(task) for task in tasks[:3]] == [1000, 0.1, 1000]  # of c, the longest of any
    assert Durations(small(tmp_path, {"a": {}}, device="cuda")).expected(tasks[0]) is None  # of another device
    began = time.monotonic()
    told = run_queue(tasks, leave_a_mark, 1, tmp_path / "logs", until=30, tell=lambda line: None)
    assert time.monotonic() - began < 25  # it does not wait for what cannot start
    assert names(told.done) == ["b1"] and names(told.left) == ["c0", "a1", "c1"]


STUDY = """
recipe: emoji
reward: emoji_clip
held_out: jpeg_compressibility
seeds: 4
common: {sampler.steps: 4}
early: draft
fixed: window
lines: {over β: [window, draft]}
drawn: [draft, window, other]
settings:
  draft: {label: DRaFT-1}
  window: {label: DRaFT+, objective.kl_coeff: 0.3}
  other: {label: DRaFT-2, objective.grad_steps: 2}
"""


def written(directory: Path) -> tuple[Path, Path]:
    """A plan, and its runs with synthetic numbers; setting `other` has one seed fewer."""
    file = directory / "small.yaml"
    file.write_text(STUDY)
    tasks = tasks_of(read_plan(file), directory / "runs", range(4), "cpu")
    for task in tasks:
        if (task.setting, task.seed) == ("other", 3):
            continue
        rewards = ("emoji_clip", "jpeg_compressibility")
        write_run(
            task.run, dict(task.keys), every=10, rewards=rewards, variants=task.setting == "draft", pictures=False
        )
        task.finish(1)
    write_run(
        directory / "runs" / "other" / "seed-3", {"seed": 3}, done_steps=10, pictures=False
    )  # which is not finished
    for name in ("samples/step-000060/00-an-owl-0.png", "adapter/pytorch_lora_weights.safetensors"):
        (directory / "runs" / "draft" / "seed-0" / name).parent.mkdir(exist_ok=True)
        (directory / "runs" / "draft" / "seed-0" / name).write_bytes(bytes(10))
    return file, directory / "runs"


def test_a_packed_study_has_the_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = written(tmp_path)
    main(["tables", str(file), "--directory", str(runs)])
    told = capsys.readouterr().out
    packed = tmp_path / "packed" / "numbers.tar.gz"
    assert pack(runs, packed) == 11
    main(["tables", str(file), "--from", str(packed)])
    assert capsys.readouterr().out == told
    for phrase in (
        "## The last step", "## LPIPS at equal gain, less DRaFT-1, stopped early", "| DRaFT-2 | 3 | +",
        "## LPIPS at equal gain, less DRaFT+, stopped early", "less over β: the best of all", "lora_scale=0.5",
        "over its annealing", "## Chosen by one half", "| gain 1.25 |", "of 3 seeds", "| DRaFT-1 → DRaFT+ | +",
    ):  # fmt: skip
        assert phrase in told, phrase
    assert "nan" not in told
    unpack(packed, tmp_path / "elsewhere")  # where it counts as finished
    plan = read_plan(file)
    tasks = tasks_of(plan, tmp_path / "elsewhere", range(4), "cpu")
    assert names([task for task in tasks if not task.finished()]) == ["other3"]
    kinds = {path.suffix for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".yaml"}  # neither pictures nor weights


def test_a_study_is_packed_again_with_fewer_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = written(tmp_path)
    whole, short = tmp_path / "whole.tar.gz", tmp_path / "short.tar.xz"
    pack(runs, whole)
    main(["pack", str(file), "--from", str(whole), "--digits", "3", "-o", str(short)])
    assert "11 runs" in capsys.readouterr().err
    assert short.stat().st_size < 0.7 * whole.stat().st_size
    unpack(short, tmp_path / "short")
    for name in ("eval.jsonl", "metrics.jsonl"):
        rows, kept = (read_rows(root / "draft" / "seed-1" / name) for root in (runs, tmp_path / "short"))
        assert [list(row) for row in rows] == [list(row) for row in kept] and rows != kept
        for row, less in zip(rows, kept, strict=True):
            numbers = {key: value for key, value in row.items() if isinstance(value, float)}
            assert {key: less[key] for key in numbers} == pytest.approx(numbers, rel=5e-3)
    tasks = tasks_of(read_plan(file), tmp_path / "short", range(4), "cpu")
    assert names([task for task in tasks if not task.finished()]) == ["other3"]  # the others are not trained again


def test_the_figure_has_the_numbers_of_the_tables(tmp_path: Path) -> None:
    file, runs = written(tmp_path)
    made = read_study(read_plan(file), runs)
    whole, *beside = figure_of(made).axes
    assert [axes.get_title(loc="left") for axes in beside] == [f"less {one.label}" for one in rivals(made)[:2]]
    for curve in made.curves.values():
        (line,) = (one for one in whole.lines if str(one.get_label()).startswith(f"{curve.label} ("))
        gain, kept = (float(values[70]) for values in line.get_data())
        drawn = bootstrap(len(curve.seeds), len(made.prompts))
        assert kept == pytest.approx(percent_at(made, gain)(curve, drawn)[0])
    for axes, rival in zip(beside, rivals(made), strict=False):
        told = [
            one.difference for curve in made.curves.values() if curve is not rival.at(1.0) for gain in GAINS
            if (one := against(made, curve, rival, gain)).difference and one.reached >= one.seeds / 2
        ]  # fmt: skip
        assert told
        bars = [one for one in axes.lines if len(one.get_xdata()) == 2 and one.get_ydata()[0] != one.get_ydata()[1]]
        assert [tuple(one.get_ydata()) for one in bars] == [(one.low, one.high) for one in told if one]
        assert [one.get_linewidth() > 2 for one in bars] == [one.low > 0 or one.high < 0 for one in told if one]
    main(["figure", str(file), "--directory", str(runs), "-o", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"


def test_unpacking_leaves_a_finished_run_as_it_is(tmp_path: Path) -> None:
    _, runs = written(tmp_path)
    pack(runs, tmp_path / "numbers.tar.gz")
    mine = runs / "draft" / "seed-0" / "eval.jsonl"
    mine.write_text("mine")
    unpack(tmp_path / "numbers.tar.gz", runs)
    assert mine.read_text() == "mine"


def test_the_best_rival_is_chosen_once_for_all_draws_and_a_winner_by_other_seeds(tmp_path: Path) -> None:
    file, runs = written(tmp_path)
    made = read_study(read_plan(file), runs)
    chosen = {rival.label: rival for rival in rivals(made)}
    assert list(chosen)[:3] == ["DRaFT-1, stopped early", "DRaFT+, stopped early", "over β: the best of all"]
    assert chosen["over β: the best of all"].at(1.0) is made.curves["window"]
    assert chosen["over β: the best of all"].at(99) is None
    rows = [row for row in chosen_apart(made).splitlines() if row.startswith(("| 0.5", "| 1 "))]
    assert len(rows) == 4 and all("| DRaFT-2 |" in row for row in rows)  # the only candidate
    assert "".join(sections(made)).count("\n| DRaFT-2 ") >= 2 * len(GAINS)


def test_runs_that_are_not_comparable_are_refused(tmp_path: Path) -> None:
    file, runs = written(tmp_path)
    path = runs / "window" / "seed-0" / "eval.jsonl"
    rows = read_rows(path)
    rows[0]["lpips_per_prompt"] = dict.fromkeys(PROMPTS, 0.9)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="different base models"):
        read_study(read_plan(file), runs)
    assert read_study(read_plan(file), runs, range(1, 9)).curves["window"].seeds == (1, 2, 3)  # without the wrong one
    with pytest.raises(ValueError, match="no finished run"):
        read_study(read_plan(file), tmp_path / "nowhere")


def test_a_plan_that_is_wrong_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(STUDY.replace("fixed: window", "fixed: windows"))
    with pytest.raises(ValueError, match="no setting is named windows"):
        read_plan(file)
    file.write_text(STUDY.replace("seeds: 4", "seed: 4"))
    with pytest.raises(ValueError, match="unknown key seed"):
        read_plan(file)
    file.write_text(STUDY)
    assert list(read_plan(file, only=["w*", "other"]).settings) == ["window", "other"]
    with pytest.raises(ValueError, match=r"no setting is named gate-\*"):
        read_plan(file, only=["gate-*"])
    assert read_plan(file, ["train.steps=7"]).common == {"sampler.steps": 4, "train.steps": 7}
    assert (list(seeds_of("3")), list(seeds_of("2:4"))) == ([0, 1, 2], [2, 3])


@pytest.mark.parametrize("name", ["study", "pilot", "methods", "ddpo", "jpeg"])
def test_every_setting_is_a_run_that_could_start_and_differs_from_the_others(name: str, tmp_path: Path) -> None:
    tasks = tasks_of(read_plan(name), tmp_path, range(1), "cpu")
    planned = [plan_run(task.recipe, task.overrides) for task in tasks]
    assert [run for _, run in planned] == [task.run for task in tasks]
    told = [repr((config.objective, config.optim, config.train, config.reward)) for config, _ in planned]
    assert len(set(told)) == len(tasks)
    assert all(not config.log.to and config.eval.max_prompts == 15 for config, _ in planned)


@pytest.mark.slow
def test_a_run_is_trained_measured_and_continued(tmp_path: Path) -> None:
    keys = {
        "sampler.steps": 2, "train.steps": 1, "eval.every": 1, "eval.max_prompts": 2, "eval.images_per_prompt": 2,
        "train.global_batch_size": 2, "checkpoint.every": 1, "log.to": [],
    }  # fmt: skip
    (short,) = small(tmp_path, {"a": keys}, seeds=1)
    train(short)
    assert not (short.run / DONE).exists() and not (short.run / "report.html").exists()
    short.finish(1)
    (longer,) = small(tmp_path, {"a": {**keys, "train.steps": 2}}, seeds=1)
    assert short.finished() and not longer.finished()
    first = read_rows(short.run / "metrics.jsonl")
    train(longer)
    assert read_rows(longer.run / "metrics.jsonl")[:1] == first  # it went on from there
    rows = read_rows(longer.run / "diversity.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    told = draftplus.evaluate([str(longer.run)], metrics=METRICS, output=tmp_path / "evaluated")
    for target, row in zip(told["targets"], (rows[0], rows[-1]), strict=True):
        for metric in METRICS:  # of pictures before and after they were rounded to 8 bits
            assert row[metric] == pytest.approx(list(target["per_prompt"][metric].values()), abs=0.02)
    train(longer, slim=True)
    kept = {path.name for path in longer.run.iterdir()}
    assert {"eval.jsonl", "metrics.jsonl", "config.yaml", "diversity.jsonl"} <= kept
    assert not kept & {"samples", "adapters", "adapter", "checkpoints"}
