"""The report says what the run's files say, stands alone, and survives a run that is not complete."""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from draftplus.config import load_config, to_yaml
from draftplus.errors import UserError
from draftplus.metrics.intervals import paired_gain
from draftplus.progress import duration
from draftplus.report import charts, curves, pictures, write_report
from draftplus.report.charts import widen
from draftplus.report.read import read_run
from draftplus.report.wording import method_in_words, show, show_gain
from draftplus.runs.directory import locked
from tests.report.page import LOADING, Page

PROMPTS = ["an owl", "a crab"]
SEEDS = (100, 101, 102)
EVALUATIONS = (0, 20, 40)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(steps: int) -> list[dict]:
    return [
        {
            "step": step, "loss": -step / 10, "reward": 18 + step / 10, "reward/emoji_clip": 18 + step / 10,
            "kl": 0.01 * math.sqrt(step), "grad_norm": 3 + math.sin(step), "clipped_fraction": 0.1, "lr": 1e-3,
            "seconds": 2.0, "images": 8, "skipped": 0,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def evaluations() -> list[dict]:
    draw = np.random.default_rng(0)
    base = draw.normal(18, 2, len(PROMPTS) * len(SEEDS))
    rows = []
    for step in EVALUATIONS:
        values = base + step / 20 + draw.normal(0, 0.5, len(base)) * (step > 0)
        rows.append(
            {
                "step": step, "reward/emoji_clip": float(values.mean()), "lpips": 0.4 - step / 1000,
                "images": len(values), "seconds": 5.0, "per_image": {"emoji_clip": values.tolist()},
                "lpips_per_prompt": {prompt: 0.4 - step / 1000 + i / 100 for i, prompt in enumerate(PROMPTS)},
            }
        )  # fmt: skip
    return rows


def write_samples(directory: Path, prompts: list[str]) -> None:
    samples = directory / "samples"
    for step in EVALUATIONS:
        (samples / f"step-{step:06d}").mkdir(parents=True)
        for index in range(len(prompts)):
            for seed in SEEDS:
                name = f"{index:02d}-a-slug-2-{seed}.png"
                Image.new("RGB", (16, 16), (step, 40 * index, seed)).save(samples / f"step-{step:06d}" / name)
        Image.new("RGB", (48, 32), (step, 0, 0)).save(samples / f"step-{step:06d}" / "grid.png")
    (samples / "prompts.json").write_text(json.dumps(prompts))


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "demo-0123abcd"
    directory.mkdir(parents=True)
    config = load_config(None, ["objective.kl_coeff=0.4", "train.steps=40"])
    (directory / "config.yaml").write_text(to_yaml(config))
    write_rows(directory / "metrics.jsonl", metrics(40))
    write_rows(directory / "eval.jsonl", evaluations())
    write_samples(directory, PROMPTS)
    (directory / "best.json").write_text(json.dumps({"step": 40, "rule": "highest held-out reward"}))
    return directory


def page_of(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


def test_the_term_on_the_path_is_drawn_in_its_parts_and_by_step(run_directory):
    """The distance at a step is its mean over the last third, whatever was drawn before, and wherever it was drawn."""
    assert "by sampling step" not in write_report(run_directory).read_text(encoding="utf-8")
    settings = [
        "objective.kl_steps=trajectory",
        "objective.kl_prefix_coeff=3",
        "objective.gate=0.25",
        "sampler.steps=4",
    ]
    (run_directory / "config.yaml").write_text(to_yaml(load_config(None, [*settings, "train.steps=40"])))
    told = metrics(40)
    for row in told:
        at, late = int(row["step"]) % 3, row["step"] > 27
        row |= {"kl/window": 0.0, "kl/prefix": row["kl"], f"kl/step/{at}": (10.0 if late else 99.0) * (at + 1)}
    told[39]["kl/step/2"] = math.nan
    write_rows(run_directory / "metrics.jsonl", told)
    text = write_report(run_directory).read_text(encoding="utf-8")
    assert "<strong>KL, steps without gradient</strong>" in text and "KL, steps with gradient" not in text
    assert "<strong>KL</strong>" not in text, "the sum of one part is that part"
    assert "(steps 28 to 40)" in text and "The frozen model draws the first 1:" in text
    (chart,) = curves._distances(read_run(run_directory))
    assert (list(chart.steps), list(chart.values)) == ([0, 1, 2], [10.0, 20.0, 30.0])
    assert "sampling step" in charts.draw(chart, "x") and "optimizer step" not in charts.draw(chart, "x")
    Page(text)
    write_rows(run_directory / "metrics.jsonl", [{**row, "kl/window": 0.1} for row in told])
    text = write_report(run_directory).read_text(encoding="utf-8")
    for title in ("KL", "KL, steps with gradient", "KL, steps without gradient", "KL, by sampling step"):
        assert f"<strong>{title}</strong>" in text


def test_page_is_well_formed_and_ids_are_unique(run_directory):
    page = page_of(run_directory)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) > 0


def test_page_loads_nothing_from_elsewhere(run_directory):
    path = write_report(run_directory)
    page = Page(path.read_text())
    addresses = [value for name in LOADING for value in page.attributes(name)]
    assert addresses and all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", path.read_text())
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]  # its own, which opens pictures


def test_references_inside_charts_resolve(run_directory):
    html = write_report(run_directory).read_text()
    page = Page(html)
    referenced = {value[1:] for value in page.attributes("href")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert referenced and referenced <= set(page.attributes("id"))


def test_numbers_are_those_of_the_evaluations(run_directory):
    first, *_, last = evaluations()
    now, base = (torch.tensor(row["per_image"]["emoji_clip"]).reshape(2, 3) for row in (last, first))
    gains = paired_gain(list(now), list(base))  # what `draftplus evaluate` tells of the same images
    gain, error = gains.mean, gains.standard_error
    assert error == pytest.approx(math.sqrt(float((now - base).var(1).sum()) / 3) / 2, rel=0.05)  # prompts are strata
    assert abs(error / (float((now - base).std()) / math.sqrt(6)) - 1) > 0.1, "another definition would be told apart"
    text = page_of(run_directory).text
    shown = re.search(r"paired gain \+([\d.]+) ± ([\d.]+) over (\d+) images", text)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(gain, abs=0.01 * error + 10 ** -len(shown[1].partition(".")[2]))
    assert shown[2] == f"{error:.2g}"
    assert int(shown[3]) == gains.images == 6
    assert f"{first['reward/emoji_clip']:.2f} → {last['reward/emoji_clip']:.2f}" in text
    assert "0.4000 → 0.3600" in text and "90% of the base model's" in text


def test_time_is_that_of_the_steps_and_evaluations(run_directory):
    text = page_of(run_directory).text
    assert "1 min 20 s" in text and "2.00 s per step" in text and "evaluations 15.0 s more" in text


def test_pictures_before_and_after_are_paired_by_prompt_and_seed(run_directory):
    titles = page_of(run_directory).attributes("title")
    expected = [f"{p}, seed {s}, step {step}" for p in PROMPTS for step in (0, 40) for s in SEEDS]
    assert titles == expected
    assert "Before (step 0), LPIPS 0.410" in page_of(run_directory).text  # of the second prompt


def test_commands_and_method_are_named(run_directory, monkeypatch):
    monkeypatch.chdir(run_directory.parent.parent)
    text = page_of(run_directory).text
    assert "draftplus train runs/demo-0123abcd/config.yaml name=demo-0123abcd-again" in text
    assert "DRaFT+" in text and "β = 0.4" in text
    assert "best evaluation at step 40 (highest held-out reward)" in text


def test_hostile_text_stays_text(run_directory):
    hostile = "<script>alert('1')</script> & \"quoted\" $name ${style}"
    (run_directory / "samples" / "prompts.json").write_text(json.dumps([hostile, "a crab"]))
    rows = [{**row, "reward/<b>x</b>": 1.0} for row in evaluations()]
    write_rows(run_directory / "eval.jsonl", rows)
    evil = run_directory.with_name("<i>run")
    run_directory.rename(evil)
    page = page_of(evil)
    tags = [tag for tag, _ in page.tags]
    assert not {"b", "i"} & set(tags) and tags.count("script") == 1
    assert f"“{hostile}”" in page.text and "<b>x</b>" in page.text and "<i>run" in page.text


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("config.yaml", "no configuration"),
        ("metrics.jsonl", "no training curves"),
        ("eval.jsonl", "no held-out numbers"),
        ("samples", "no pictures"),
        ("samples/prompts.json", "prompts are shown by number"),
    ],
)
def test_what_is_absent_is_named(run_directory, absent, said):
    path = run_directory / absent
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert said in page_of(run_directory).text


def test_complete_run_names_nothing_absent(run_directory):
    assert "Not found" not in page_of(run_directory).text


def test_run_without_a_step(run_directory):
    (run_directory / "metrics.jsonl").write_text("")
    write_rows(run_directory / "eval.jsonl", evaluations()[:1])
    for step in ("step-000020", "step-000040"):
        shutil.rmtree(run_directory / "samples" / step)
    text = page_of(run_directory).text
    assert "No training step is recorded" in text and "one evaluation only" in text and "After" not in text


def test_single_step(run_directory):
    write_rows(run_directory / "metrics.jsonl", metrics(1))
    assert "1 of 40 steps" in page_of(run_directory).text


def test_broken_last_line_is_named_and_the_rest_is_used(run_directory):
    with (run_directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "rew')
    text = page_of(run_directory).text
    assert "metrics.jsonl, line 41" in text and "40 steps" in text


def test_values_that_are_not_finite_leave_a_gap(run_directory):
    rows = metrics(40)
    rows[10].update(reward=None, loss=math.nan, grad_norm=math.inf)
    rows[-1].update(skipped=1)  # counts from the start of the run
    write_rows(run_directory / "metrics.jsonl", rows)
    text = page_of(run_directory).text
    assert "Training reward" in text and "1 update skipped because" in text


def test_evaluations_without_single_values_show_no_error(run_directory):
    rows = [{k: v for k, v in row.items() if k != "per_image"} for row in evaluations()]
    write_rows(run_directory / "eval.jsonl", rows)
    text = page_of(run_directory).text
    assert "gain +" in text and "paired gain" not in text


def test_grids_stand_in_for_single_pictures(run_directory):
    for path in (run_directory / "samples").glob("step-*/*-*.png"):
        path.unlink()
    assert "all pictures at step 40" in page_of(run_directory).attributes("alt")


def sides(directory: Path) -> set[int]:
    sources = [source for source in page_of(directory).attributes("src") if source.startswith("data:image")]
    return {Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).width for source in sources}


def test_pictures_are_in_the_page_at_full_size_unless_they_are_too_many(run_directory, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    for path in (run_directory / "samples").glob("step-*/0*.png"):
        Image.fromarray(noise).save(path)
    assert sides(run_directory) == {512}
    assert "demo-0123abcd/samples/step-000040/01-a-slug-2-102.png" in page_of(run_directory).attributes("data-file")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 12 * 300**2)  # of 2 prompts, 3 seeds and 2 steps
    assert sides(run_directory) == {256}
    assert write_report(run_directory).stat().st_size < 1_000_000
    assert [pictures.largest_side(n) for n in (1, 10**5)] == [1024, 192]


def test_a_running_run_says_how_far_it_is(run_directory):
    with locked(run_directory):
        assert "Running, step 40 of 40" in page_of(run_directory).text
        (run_directory / "metrics.jsonl").unlink()
        assert "Running, step 0 of 40" in page_of(run_directory).text
    assert "Running" not in page_of(run_directory).text


def test_a_difference_of_a_thousandth_does_not_look_like_a_step():
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([10.75, 10.751], [0.35, 0.3501])
    widen(axes, "xy")
    for low, high, middle in (*((*axes.get_xlim(), 10.7505),), (*axes.get_ylim(), 0.35005)):
        assert high - low >= 0.05 * middle and (low + high) / 2 == pytest.approx(middle)
    axes.clear()
    axes.plot([1.0, 20.0], [-1.0, 1.0])
    before = (axes.get_xlim(), axes.get_ylim())
    widen(axes, "xy")
    assert (axes.get_xlim(), axes.get_ylim()) == before


def test_writing_elsewhere_leaves_the_run_alone(run_directory, tmp_path):
    before = sorted(run_directory.rglob("*"))
    assert write_report(run_directory, tmp_path / "page.html") == tmp_path / "page.html"
    assert sorted(run_directory.rglob("*")) == before


def test_no_run_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(UserError, match="not a run"):
        write_report(tmp_path)


PATH = {"method": "draft", "grad_steps": 1, "kl_coeff": 0.0, "kl_steps": "trajectory", "kl_draws": 1}


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"method": "draft", "grad_steps": 1, "kl_coeff": 0.0},
            "DRaFT: gradient through the last of 10 sampling",
        ),
        ({"method": "draft", "grad_steps": 3, "kl_coeff": 2}, "DRaFT+: gradient through the last 3 of 10"),
        ({"method": "draft", "grad_steps": "all", "kl_coeff": 0}, "gradient through all 10 sampling steps"),
        ({"method": "refl", "grad_steps": 1, "kl_coeff": 0}, "ReFL: gradient through one random late step of 10"),
        ({"method": "alignprop", "grad_steps": 1, "kl_coeff": 1}, "AlignProp with the KL term of DRaFT+"),
        ({"method": "draft", "grad_steps": 1, "kl_coeff": 0}, "no KL term"),
        ({**PATH, "kl_prefix_coeff": 30.0}, "DRaFT+: gradient through the last of 10 sampling steps"),
        (
            {**PATH, "kl_prefix_coeff": 30.0},
            ", KL coefficient λ = 30 at 1 step without gradient, drawn anew each time, in",
        ),
        (
            {**PATH, "kl_coeff": 2.0, "kl_draws": 2, "kl_weights": "path"},
            "KL coefficients β = 2 at the steps with gradient and λ = 2 at 2 steps without, drawn anew each time, "
            "weighted as in the KL divergence of paths, in noise space",
        ),
        ({**PATH, "kl_prefix_coeff": 0.0}, "DRaFT: gradient through the last of 10 sampling steps, no KL term"),
        ({"method": "draft", "grad_steps": 1, "gate": 0.5}, "the frozen model draws the first 5 of 10 steps"),
        ({"method": "draft", "grad_steps": "all", "gate": 0.5}, "DRaFT: gradient through the last 5 of 10 sampling"),
        ({"method": "draft", "grad_steps": 1, "gate": 0.1}, "the frozen model draws the first of 10 steps"),
    ],
)
def test_method_in_words(objective, said):
    config = {"objective": {**objective, "kl_space": "noise"}, "sampler": {"steps": 10}, "model": {"path": "emoji"}}
    assert said in method_in_words(config)


def test_numbers_as_people_write_them():
    assert show(0.41, 0.386) == "0.4100" and show(21.2149) == "21.21" and show(None) == "–" and show(0.0) == "0"
    assert show_gain(2.988, 0.1554) == "+2.99 ± 0.16" and show_gain(-0.25) == "−0.250"
    assert show_gain(0.7, 1e-17) == "+0.700 ± 0.000"  # an error of rounding is none
    assert show(math.nan) == "not finite" and show_gain(0.0, 0.0) == "0.000 ± 0.000"
    assert duration(42) == "42.0 s" and duration(209) == "3 min 29 s" and duration(7260) == "2 h 1 min"
