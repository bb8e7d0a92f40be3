"""What a user gets wrong is said in one or two plain lines: the value, the place, the remedy. Exit status 2."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from draftplus.training import checkpoint
from tests.support.processes import ROOT
from tests.support.runs import REWARDS, train_here

Refused = Callable[..., None]

# settings over the recipe, and what must be said
TRAIN = {
    "unknown key": (["optim.lrr=1"], ["optim.lrr", r"did you mean 'optim\.lr'"]),
    "unknown section": (["optimizer.lr=1"], ["optimizer", "did you mean"]),
    "no value": (["optim.lr"], ["optim.lr", "KEY=VALUE"]),
    "wrong type": (["train.steps=many"], [r"train\.steps", "many"]),
    "wrong type in a list": (["optim.betas=[a,b]"], [r"optim\.betas"]),
    "unreadable value": (["optim.betas=[1"], [r"optim\.betas"]),
    "not a method": (["objective.method=draftlv"], [r"objective\.method", "draft_lv"]),
    "no model": (["model.path=./no/such/model"], [r"no/such/model", "no such directory"]),
    "no built-in model": (["model.path=emojo"], ["emojo", "did you mean 'emoji'"]),
    "no replacement": (["model.denoiser=./no.safetensors"], [r"model\.denoiser", "no.safetensors"]),
    "no prompt file": (["data.prompts=no.txt"], ["no.txt"]),
    "no prompt set": (["data.prompts=animal"], ["animals"]),
    "grad_steps above steps": (["objective.grad_steps=4"], [r"objective\.grad_steps is 4", r"sampler\.steps is 3"]),
    "grad_steps of one step": (["objective.method=draft_lv", "objective.grad_steps=2"], [r"objective\.grad_steps"]),
    "micro-batches": (["train.micro_batch_size=3"], [r"train\.global_batch_size=4", r"train\.micro_batch_size=3"]),
    "images per prompt": (["data.images_per_prompt=3"], [r"data\.images_per_prompt=3"]),
    "no module": (["reward=no_such_module:score"], ["no_such_module"]),
    "no object": ([f"reward={REWARDS}:no_such_reward"], ["no_such_reward"]),
    "no reward": (["reward=emoji_clap"], ["emoji_clip"]),
    "reward's arguments": ([f"reward={{{REWARDS}:brightness: {{args: {{gian: 1}}}}}}"], ["gian"]),
    "wrong shape": ([f"reward={REWARDS}:wrong_shape"], [r"wrong_shape", r"\(4, 1\)", r"\(4,\)"]),
    "detached": ([f"reward={REWARDS}:detached"], ["detached", "no gradient"]),
    "only measured": ([f"reward={REWARDS}:measured_only"], ["measured_only", "no gradient"]),
    "not finite": ([f"reward={REWARDS}:always_nan"], ["always_nan", "not finite at the first step"]),
    "only one image": (["eval.images_per_prompt=1"], [r"eval\.images_per_prompt"]),
    "unknown logger": (["log.to=[tensorbord]"], ["tensorbord", "tensorboard"]),
    "sharding": (["parallel.mode=shard", "model.quantize=int8"], [r"model\.quantize=int8 does not work with par"]),
    "8 bits in parts": (
        ["parallel.mode=shard", "model.lora=null", "optim.name=adamw_8bit"], [r"optim\.name=adamw_8bit does not work"]
    ),
    "parts of nothing": (["parallel.shard_size=2"], [r"parallel\.shard_size is 2, but parallel\.mode is auto"]),
    "no size": (["parallel.shard_frozen_above=much"], [r"parallel\.shard_frozen_above is 'much'; give a size"]),
    "device": (["device=cuda:99"], ["cuda:99"]),
    "size": (["sampler.height=33"], [r"sampler\.height is 33"]),
    "targets": (["model.lora.targets=[to_nothing]"], ["to_nothing"]),
    "solver": (["sampler.solver=dimm"], ["dimm", "ddim"]),
    "too many steps": (["sampler.steps=2000"], [r"sampler\.steps is 2000"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAIN)
def test_training(refused: Refused, settings: list[str], tmp_path: Path, monkeypatch: Any, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, patterns = TRAIN[case]
    refused(["train", *settings, *overrides], *patterns)
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("case", ["unknown key", "micro-batches", "no reward", "only measured", "sharding"])
def test_a_dry_run_says_the_same(refused: Refused, settings: list[str], case: str) -> None:
    overrides, patterns = TRAIN[case]
    refused(["train", *settings, *overrides, "--dry-run"], *patterns)


def test_unknown_recipe(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["train", "emojy"], "emojy", "emoji")
    refused(["train", "./recipes/mine.yaml"], r"recipes/mine\.yaml")
    refused(["train", "runs/gone"], "runs/gone")


def test_a_recipe_that_is_not_yaml(refused: Refused, tmp_path: Path) -> None:
    for text in ("optim: [1", "- a\n- b\n", "optim: {lrr: 1}"):
        (tmp_path / "mine.yaml").write_text(text)
        refused(["train", tmp_path / "mine.yaml"], "mine.yaml|lrr")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("was-run",))


@pytest.mark.parametrize("key", ["model.path", "model.denoiser", "model.vae"])
@pytest.mark.parametrize("suffix", ["ckpt", "bin"])
def test_a_pickle_that_needs_code(
    refused: Refused, settings: list[str], tmp_path: Path, monkeypatch: Any, key: str, suffix: str
) -> None:
    """It is refused, and what is in it is not run."""
    monkeypatch.chdir(tmp_path)
    if (key, suffix) == ("model.path", "bin"):
        pytest.skip("a .bin is no whole model")
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(pickle.dumps({"state_dict": Harmful()}))
    refused(["train", *settings, f"{key}={file}"], "run code", f"weights.{suffix}")
    assert not (tmp_path / "was-run").exists()


def test_a_pickle_inside_a_model_directory(
    refused: Refused, settings: list[str], small: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(small, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"w": Harmful()}))
    refused(["train", *settings, f"model.path={model}"], "run code", "diffusion_pytorch_model.bin")
    assert not (tmp_path / "was-run").exists()


def test_prompt_files(refused: Refused, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(["train", *settings, f"data.prompts={tmp_path / 'empty.txt'}"], "empty.txt", "no prompts")
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for number in range(20):
            member = tarfile.TarInfo(f"{number:03d}.txt")
            member.size = 600
            tar.addfile(member, BytesIO(b"a cat" + b" " * 595))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:9000])
    refused(["train", *settings, f"data.prompts={tmp_path / 'cut.tar'}"], "cut.tar", "truncated")
    refused(["generate", "emoji", "--prompts", str(tmp_path / "empty.txt")], "empty.txt")


def test_a_directory_that_cannot_be_written(
    refused: Refused, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(["train", *settings, f"output_dir={tmp_path / 'file'}"], str(tmp_path / "file"), "output_dir=")
    refused(
        ["generate", "emoji", "--prompt", "a cat", "-o", tmp_path / "file"],
        "name another output directory",
        str(tmp_path / "file"),
    )

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", denied)
    refused(["train", *settings], "cannot be written: Permission denied", "output_dir=")


def test_another_process_in_the_directory(refused: Refused, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "run" / ".lock"):
        refused(["train", *settings], "another process", "name=")


def test_a_changed_key(refused: Refused, settings: list[str]) -> None:
    run = train_here(settings, "train.steps=2")
    refused(["train", *settings, "optim.lr=0.5"], r"optim\.lr=0\.01", "0.5", "name=")
    refused(["train", run, "model.lora=null"], r"model\.lora")
    refused(["train", run, f"reward={REWARDS}:brightness"], "reward")


def test_no_space_left(refused: Refused, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    refused(["train", *settings], "no space left", "step-000002")


GENERATE = {
    "seeds in words": (["--seeds", "many"], ["--seeds 'many'", "0:16"]),
    "seeds that end first": (["--seeds", "5:2"], ["--seeds '5:2'"]),
    "negative seeds": (["--seeds=-3:2"], ["--seeds"]),
    "seeds too large": (["--seeds", str(2**64)], ["--seeds"]),
    "annealing": (["--anneal", "quadratic", "--adapter", "adapter"], ["quadratic", "linear"]),
    "nothing to anneal": (["--anneal", "linear"], ["no trained weights"]),
    "no adapter": (["--adapter", "nowhere"], ["nowhere"]),
    "a key of generate": (["sampler.step=3"], [r"sampler\.step'", r"sampler\.steps"]),
    "reward": (["--reward", "emoji_clap"], ["emoji_clip"]),
    "reward's shape": (["--reward", f"{REWARDS}:wrong_shape"], ["wrong_shape", "shape"]),
    "unknown option": (["--promt", "a dog"], ["--promt"]),
    "no number": (["--lora-scale", "much"], ["--lora-scale", "number"]),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generating(
    refused: Refused, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options, patterns = GENERATE[case]
    if case == "annealing":
        train_here(settings, "train.steps=1").joinpath("adapter").rename(tmp_path / "adapter")
    refused(
        ["generate", small, "--prompt", "a cat", "--seeds", "0", "sampler.steps=2", "device=cpu", *options], *patterns
    )


def test_generating_from_nothing(refused: Refused, small: Path, settings: list[str], tmp_path: Path) -> None:
    refused(["generate", small], "no prompt", "--prompt")
    refused(["generate", f"{small}@best", "--prompt", "a cat"], "not a run directory")
    refused(["generate", "--prompt", "a cat"], "MODEL")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text(f"extends: {settings[0]}\n")
    refused(["generate", tmp_path / "runs" / "run", "--prompt", "a cat"], "no trained weights yet")
    refused(["generate", f"{tmp_path / 'runs' / 'run'}@best", "--prompt", "a cat"], "no best.json")


def test_reports_of_nothing(refused: Refused, tmp_path: Path) -> None:
    refused(["report", tmp_path], str(tmp_path), "no runs found", "not a run")
    refused(["report", tmp_path / "gone"], "gone: no such run directory, sweep or eval.json")
    refused(["report"], "RUN")
    (tmp_path / "eval.json").write_text("[]")
    refused(["report", tmp_path / "eval.json"], "no runs found", "not what draftplus evaluate writes")


SWEEP = {
    "empty grid": ([], ["the grid is empty"]),
    "no value": (["seed="], ["seed=", "KEY=V1,V2"]),
    "too many runs": (["seed=" + ",".join(map(str, range(1001)))], ["1,001 runs", "at most 1,000"]),
    "a key twice": (["seed=0", "seed=1"], ["seed is given twice"]),
    "names": (["name=a,b"], ["name=a,b", "cannot range over name"]),
    "directories": (["output_dir=a,b"], ["cannot range over output_dir"]),
    "unknown key": (["optim.lrr=1,2"], [r"optim\.lrr=1", r"did you mean 'optim\.lr'"]),
    "wrong type": (["train.steps=4,many"], [r"train\.steps=many"]),
    "out of range": (["objective.kl_coeff=0,-1"], [r"objective\.kl_coeff is -1"]),
    "brackets": (["optim.betas=[0.9,0.99"], [r"optim\.betas: ", "the closing ] is missing"]),
    "the same twice": (["seed=1,1"], ["seed=1 is in the sweep twice"]),
    "name": (["seed=1", "--name", "a/b"], ["name 'a/b': give a plain name"]),
}


@pytest.mark.parametrize("case", SWEEP)
def test_sweeping(refused: Refused, tmp_path: Path, monkeypatch: Any, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, patterns = SWEEP[case]
    refused(["sweep", "emoji", *arguments], *patterns)
    refused(["sweep", "emoji", *arguments, "--dry-run"], *patterns)
    assert list(tmp_path.iterdir()) == []


def test_sweeping_without_a_recipe(refused: Refused, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["sweep", "seed=0,1"], "seed=0,1", "where the recipe should be")
    refused(["sweep", "emojy", "seed=0,1"], "did you mean 'emoji'")
    refused(["sweep", "gone.yaml"], "the grid is empty|gone.yaml")
    (tmp_path / "mine.yaml").write_text("recipe: emoji\ngird: {seed: [0]}\n")
    refused(["sweep", "mine.yaml"], "unknown key 'gird'; did you mean 'grid'")


def test_no_such_command(refused: Refused) -> None:
    refused(["trian"], "trian")


def test_an_error_of_the_users_own_code_keeps_its_traceback(draftplus: Any, settings: list[str]) -> None:
    printed = draftplus("train", *settings, f"reward={REWARDS}:broken")
    assert printed.code == 1
    assert "ZeroDivisionError: of the user's own code" in printed.err
    assert "rewards.py" in printed.err


@pytest.mark.slow
def test_nothing_else_is_printed(settings: list[str], tmp_path: Path) -> None:
    """In a process of its own, where the libraries say what they say on loading: only ours."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "draftplus", "train", *settings, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    bad = run(f"reward={REWARDS}:detached")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("draftplus: the scores of reward") and len(bad.stderr.splitlines()) == 2
    good = run("model.lora=null", "train.steps=1", "log.to=[tensorboard]")
    assert good.returncode == 0, good.stderr
    assert [line for line in good.stderr.splitlines() if not line.startswith("training: ")] == []  # of a slow machine
    assert len(good.stdout.splitlines()) == 2
