"""`draftplus evaluate`: its table, its files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftplus.cli.evaluate import shown
from draftplus.runs.rows import MetricRow
from tests.support.runs import REWARDS, train_here

SMALL = ["--images-per-prompt", "2", "device=cpu", "sampler.steps=2"]


def test_the_command(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    # a directory with '=' in its name, which no run gets any more, is a target and no setting
    run = train_here(settings, "train.steps=1")
    run = run.rename(run.with_name("lr=0.01"))
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a cat\na cat\nan owl\n")
    out = tmp_path / "out"
    printed = draftplus(
        "evaluate", run, f"{run}@0", *SMALL, "--prompts", prompts, "--metric", "lpips", "--metric", "vendi",
        "--reward", f"{REWARDS}:brightness", "--lora-scale", "0.5", "-o", out, "--trust",
    )  # fmt: skip
    assert (printed.code, printed.err) == (0, ""), printed
    told = json.loads((out / "eval.json").read_text())
    assert told["prompts"] == ["a cat", "an owl"] and told["sampler"]["steps"] == 2
    header, *lines = printed.out.splitlines()
    for name in (f"{REWARDS}:redness", f"{REWARDS}:brightness", "lpips", "vendi"):
        assert name in header
    for line, target in zip(lines, told["targets"], strict=False):
        assert line.startswith(target["label"])
        for number in target["metrics"].values():
            assert f"{number['mean']:.3f}" in line
    assert [target["label"] for target in told["targets"]] == [
        "base",
        *(f"lr=0.01{at} lora_scale=0.5" for at in ("", "@0")),
    ]
    assert str(out / "eval.json") in printed.out
    assert sorted(path.name for path in (out / "pictures" / "base").iterdir()) == [
        "00-a-cat-0.png", "00-a-cat-1.png", "01-an-owl-2.png", "01-an-owl-3.png", "grid.png"
    ]  # fmt: skip


def test_what_is_refused(refused: Callable[..., None], small: Path, tmp_path: Path) -> None:
    refused(["evaluate"], "MODEL|RUN")
    refused(["evaluate", "sampler.steps=3"], "no target given")
    refused(["evaluate", small, "--metric", "lpisp"], "did you mean 'lpips'")
    refused(["evaluate", small, "--reward", "emoji_clap"], "did you mean 'emoji_clip'")
    refused(["evaluate", small, "--images-per-prompt", "1", "device=cpu"], "'lpips' needs at least 2 images")
    refused(["evaluate", small, "--images-per-prompt", "0"], "images per prompt is 0")
    refused(["evaluate", small, "--seeds", "5:2"], "--seeds '5:2'")
    refused(["evaluate", f"{small}@best"], "not a run directory")
    refused(["evaluate", "emojy"], "did you mean 'emoji'")
    refused(["evaluate", tmp_path / "gone"], "no such run, model or adapter")
    refused(["evaluate", "runs/gone"], "'runs/gone': no such run, model or adapter")
    (tmp_path / "runs" / "lion").mkdir(parents=True)
    refused(["evaluate", tmp_path / "runs" / "lino"], "no such run, model or adapter; did you mean '.*lion'")
    refused(["evaluate", "emoji", f"model.path={small}"], "is given but model.path=.* is set too")
    refused(["evaluate", small, "--features", small], "no chosen metric uses features")
    refused(["evaluate", small, "--reward", "lpips"], "this is a metric; name it among the metrics instead")
    refused(["evaluate", small, "--reward", "dissimilarity"], "scores a training batch")
    refused(["evaluate", "runs/lr=0.1"], "runs/lr=0.1 does not exist, so it was read as a setting")
    refused(["evaluate", small, "--anneal", "linear"], "no trained weights")
    refused(["evaluate", small, "sampler.stepz=3"], r"sampler\.steps")
    (tmp_path / "file").write_text("")
    refused(["evaluate", small, "-o", tmp_path / "file"], "name another output directory")


def test_numbers_in_the_table() -> None:
    assert shown(MetricRow(1.23456, 0.1)) == "1.235 ± 0.100"
    assert shown(MetricRow(1.23456)) == "1.235"
    assert shown(MetricRow(1.23456, 0.1, change=MetricRow(-0.5, 0.25))) == "1.235 ± 0.100 (-0.500 ± 0.250)"
