"""Adapters on the command line: a file or a directory, of a run or of another hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from draftplus.models.lora_files import LORA_FILE
from tests.support.runs import train_here
from tests.tiny import randomize, tiny_model


@pytest.fixture
def style(small: Path, tmp_path: Path) -> Path:
    """A LoRA file by itself, under a name of its own."""
    made = tiny_model(small)
    randomize(made, size=0.3)
    made.tuned.save(tmp_path / "made")
    return (tmp_path / "made" / LORA_FILE).rename(tmp_path / "style.safetensors")


def pictures(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.rglob("*.png")) if path.name != "grid.png"]


def test_generate_takes_the_file(draftplus: Callable[..., Any], small: Path, style: Path, tmp_path: Path) -> None:
    common = ["generate", small, "sampler.steps=2", "device=cpu", "--prompt", "a cat", "--seeds", "3"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.safetensors").write_bytes(style.read_bytes())
    for name, more in {"base": [], "file": ["--adapter", style], "in": ["--adapter", tmp_path / "one"]}.items():
        assert draftplus(*common, *more, "-o", tmp_path / name).code == 0
    base, file, within = (pictures(tmp_path / name) for name in ("base", "file", "in"))
    assert file == within != base


def test_evaluate_takes_the_file(draftplus: Callable[..., Any], small: Path, style: Path, tmp_path: Path) -> None:
    wanted = ["--prompts", tmp_path / "p.txt", "--images-per-prompt", "2", "--metric", "lpips"]
    (tmp_path / "p.txt").write_text("a cat\n")
    printed = draftplus("evaluate", small, style, *wanted, "sampler.steps=2", "device=cpu", "-o", tmp_path / "e")
    assert printed.code == 0, printed.err
    told = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert [target["label"] for target in told["targets"]] == [str(small), "style.safetensors"]
    assert told["targets"][1]["metrics"]["lpips"]["change"]["mean"] != 0


def test_the_file_of_a_run_is_the_runs(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    run = train_here(settings, "train.steps=1", "eval.every=1")
    file = run / "adapters" / "step-000001" / LORA_FILE
    printed = draftplus("evaluate", file, "--metric", "lpips", "-o", tmp_path / "e")
    assert printed.code == 0, printed.err
    target = json.loads((tmp_path / "e" / "eval.json").read_text())["targets"][1]
    assert target["run"] == str(run) and target["step"] == 1


def test_mistakes(refused: Callable[..., None], small: Path, style: Path, tmp_path: Path) -> None:
    prompt = ["--prompt", "a cat"]
    refused(["generate", style, *prompt], r"style\.safetensors' is an adapter; name the model or run that it is for")
    refused(["generate", small, *prompt, "--adapter", tmp_path / "no"], "no such file or directory")
    save_file({f"lora_unet_{name}": t for name, t in load_file(style).items()}, tmp_path / "odd.safetensors")
    refused(["generate", small, *prompt, "--adapter", tmp_path / "odd.safetensors"], "odd.safetensors")
