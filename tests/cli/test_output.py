"""Where `generate` and `evaluate` write by themselves: no result takes the place of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftplus.evaluation import latents
from tests.support.runs import train_here

CAT = ["--prompt", "a cat", "--seeds", "0:2", "sampler.steps=2", "device=cpu"]


@pytest.fixture
def run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = train_here(settings, "train.steps=1")
    monkeypatch.chdir(tmp_path)
    return made.relative_to(tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_other_knobs_have_directories_of_their_own(draftplus: Callable[..., Any], run: Path) -> None:
    plain = ["generate", run, "--prompt", "a cat", "--seeds", "0:2"]
    assert draftplus(*plain).code == 0
    first = contents(Path("generated/run"))
    other = {
        "run_lora_scale-0.5": [*plain, "--lora-scale", "0.5"],
        "run_anneal-power-2": [*plain, "--anneal", "power:2"],
        "run-0_steps-2": [*plain[:1], f"{run}@0", *plain[2:], "sampler.steps=2"],
    }
    for arguments in other.values():
        assert draftplus(*arguments).code == 0
    assert sorted(path.name for path in Path("generated").iterdir()) == sorted(["run", *other])
    assert draftplus("generate", run, "--prompt", "a fox", "--seeds", "0:2").code == 0  # prompts are in no name
    assert draftplus("generate", run, "--prompt", "a cat", "--seeds", "0:3").code == 0
    again = [path.name for path in Path("generated").iterdir() if path.name not in ("run", *other)]
    assert len(again) == 2 and all(name.startswith("run-") for name in again)
    assert contents(Path("generated/run")) == first
    assert draftplus(*plain).code == 0 and len(list(Path("generated").iterdir())) == len(other) + 3  # in its own place


def test_a_run_of_the_same_name_is_another(draftplus: Callable[..., Any], settings: list[str], run: Path) -> None:
    train_here(settings, "train.steps=1", "seed=5", "output_dir=others")
    for parent in ("runs", "others", "runs"):
        assert draftplus("generate", f"{parent}/run", *CAT).code == 0
    assert len(list(Path("generated").iterdir())) == 2


def test_evaluations(draftplus: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    sampled = latents.sampled_latents

    def counted(model: Any, jobs: Any, *rest: Any) -> Any:
        made.append(len(jobs))
        return sampled(model, jobs, *rest)

    monkeypatch.setattr(latents, "sampled_latents", counted)
    assert draftplus("evaluate", run).code == 0
    first = contents(Path("evaluated/run"))
    assert sum(made) == 8 and "eval.json" in first
    assert draftplus("evaluate", run, "--metric", "lpips", "--metric", "jpeg_compressibility").code == 0
    assert sum(made) == 8  # the same images are measured otherwise
    assert draftplus("evaluate", run, "--anneal", "linear", "sampler.steps=2").code == 0
    names = ["run", "run_anneal-linear_steps-2", "run_metric-lpips-jpeg_compressibility"]
    assert sorted(path.name for path in Path("evaluated").iterdir()) == names
    kept = contents(Path("evaluated/run"))
    assert {name: kept[name] for name in first} == first


def test_a_directory_that_is_named_is_taken(draftplus: Callable[..., Any], run: Path) -> None:
    for seeds in ("0:1", "0:2"):
        assert draftplus("generate", run, "--prompt", "a cat", "--seeds", seeds, "-o", "mine").code == 0
    assert not Path("generated").exists() and not Path("mine/command.json").exists()


def test_what_is_refused_leaves_no_directory(draftplus: Callable[..., Any], run: Path) -> None:
    assert draftplus("evaluate", run, "--metric", "lpisp").code == 2
    assert draftplus("generate", run, "--prompt", "a cat", "--reward", "emoji_clap").code == 2
    assert not [*Path("evaluated").glob("*"), *Path("generated").glob("*")]


def test_what_was_stopped_goes_on_in_its_own_directory(draftplus: Callable[..., Any], run: Path) -> None:
    assert draftplus("evaluate", run).code == 0
    Path("evaluated/run/eval.json").unlink()
    Path("evaluated/run/command.json").unlink()
    assert draftplus("evaluate", run).code == 0
    assert [path.name for path in Path("evaluated").iterdir()] == ["run"]
