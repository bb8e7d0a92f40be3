"""What a system denies, and what a terminal must not be told: one line, and never a traceback."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from filelock import FileLock
from PIL import Image

import draftplus.api  # before a test replaces what it imports
from draftplus import api, hub
from draftplus.cli.failures import in_one_line
from draftplus.config import load_config, to_yaml
from draftplus.errors import UserError, printable
from draftplus.evaluation import gallery, pictures
from draftplus.models.families import hub_index
from draftplus.training import fine_tuning

Refused = Callable[..., None]


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "ENAMETOOLONG", "EDQUOT", "EIO"])
def test_what_the_system_denies_is_one_line_with_the_path(
    draftplus: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    def denied(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    monkeypatch.setattr(gallery, "make_gallery", denied)
    printed = draftplus("generate", small, "--prompt", "a cat", "-o", tmp_path / "out")
    assert printed.code == 1 and printed.err == f"draftplus: {tmp_path / 'file'}: {os.strerror(number)}\n"


def test_what_may_not_be_read_is_one_line_with_the_path(
    refused: Refused, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "file"))

    monkeypatch.setattr(gallery, "make_gallery", denied)
    refused(["generate", small, "--prompt", "a cat", "-o", tmp_path / "out"], f"{tmp_path}/file: Permission denied; ")


@pytest.mark.parametrize("name", ["half.jsonl", "half.csv"])
def test_prompts_are_looked_at_before_a_model_is_loaded(
    refused: Refused, settings: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(fine_tuning, "build_model", loading)
    monkeypatch.setattr(gallery, "build_model", loading)
    path = tmp_path / name
    path.write_text('{"prompt": "a cat"}\n{"prompt": "a \\ud83d"}\n' if name.endswith("l") else 'prompt\n"a cat\n')
    refused(["train", *settings, f"data.prompts={path}"], rf"{path}, line \d")
    refused(["train", *settings, f"data.prompts={path}", "--dry-run"], rf"{path}, line \d")
    refused(["generate", small, "--prompts", path], rf"{path}, line \d")
    refused(["sweep", *settings, f"data.prompts={path}", "seed=0,1", "--dry-run"], rf"{path}, line \d")


def test_the_home_of_nobody(refused: Refused, settings: list[str]) -> None:
    path = "~nobody-of-this-name/x.txt"
    words = f"'{path}': there is no home directory ~nobody-of-this-name; write the whole path"
    for key in ("model.path", "data.prompts", "model.vae", "reward.emoji_clip.path"):
        refused(["train", *settings, f"{key}={path}"], f"{key} {words}")
    refused(["generate", path, "--prompt", "a cat"], words)
    refused(["evaluate", path], words)
    refused(["generate", "emoji", "--prompts", path], f"--prompts {words}")


def test_a_full_disk_in_generate(draftplus: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures.Image.Image, "save", full)
    printed = draftplus("generate", small, "device=cpu", "sampler.steps=1", "--prompt", "a", "-o", tmp_path / "out")
    assert printed.code != 0 and len(printed.err.splitlines()) == 1
    assert f"{tmp_path / 'out'}: no space left on the disk" in printed.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of …"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_to_lower(
    draftplus: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gallery, "make_gallery", fail)
    printed = draftplus("generate", small, "--prompt", "a cat", "-o", tmp_path / "out")
    assert printed.code == 1 and len(printed.err.splitlines()) == 1
    assert "out of memory" in printed.err and "lower train.micro_batch_size" in printed.err


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (
            "CUDA out of memory. GPU 0 has a total capacity of 23.69 GiB of which 1 GiB is free.",
            "--memory 23.69GB says",
        ),
        ("DefaultCPUAllocator: can't allocate memory", "--memory with the size of the device, such as 24GB, says"),
    ],
)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_out_of_memory_points_to_the_plan(
    draftplus: Any, monkeypatch: pytest.MonkeyPatch, words: str, size: str, ranks: str
) -> None:
    """Of this recipe and these settings, in a command that can be copied."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(api, "_train", fail)
    printed = draftplus("train", "sdxl_pickscore", "model.path=emoji", "data.prompts=my prompts.txt")
    assert printed.code == 1 and len(printed.err.splitlines()) == 1
    several = "" if ranks == "1" else f" --gpus {ranks}"
    command = f"draftplus plan sdxl_pickscore model.path=emoji 'data.prompts=my prompts.txt'{several} {size} which"
    assert command in printed.err


def test_torchs_own_words_for_a_cpu_without_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert "out of memory" in str(in_one_line(error.value))


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError(), FileNotFoundError(2, "No such")])
def test_other_failures_keep_their_traceback(error: Exception) -> None:
    assert in_one_line(error) is None


def test_no_control_character_reaches_the_terminal(draftplus: Any, tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text('{"text": "a \\u001b[2J cat\\u2028"}\n{"text": "a  \\u001b[2J CAT", "split": "held_out"}\n')
    printed = draftplus("train", "emoji", f"data.prompts={path}", f"output_dir={tmp_path}")
    assert printed.code == 2 and "a \\x1b[2J cat" in printed.err and printed.err.rstrip("\n").isprintable()
    printed = draftplus("sweep", "emoji", "sampler.negative_prompt=a\x1bc,b", "--dry-run")
    assert printed.code == 0 and "\\x1b" in printed.out and "\x1b" not in printed.out
    assert "\x1b" not in to_yaml(load_config(None, ["sampler.negative_prompt=\x1b[2J"]))
    assert printable("é 🦊\n\t\x07\u202e") == "é 🦊\n\\t\\x07\\u202e"


def test_mistakes_of_generate(refused: Refused, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "syntax_here.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "import_here.py").write_text("\nimport nothing_like_it\n")
    (tmp_path / "raises_here.py").write_text("\n\nraise KeyError('boo')\n")
    (tmp_path / "exits_here.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "model_index.json").write_text("[1]")
    one = ["generate", small, "--prompt", "a cat", "device=cpu"]
    refused([*one, "--reward", "syntax_here:f"], r"syntax_here\.py, line 2: SyntaxError")
    refused([*one, "--reward", "import_here:f"], r"import_here\.py, line 2: ModuleNotFoundError: .*nothing_like_it")
    refused([*one, "--reward", "raises_here:f"], r"raises_here\.py, line 3: KeyError: 'boo'")
    refused([*one, "--reward", "exits_here:f"], r"exits_here\.py, line 2: SystemExit")
    refused([*one, "--seeds", "0:100000000000"], "more than 1,000,000 seeds")
    refused([*one, "device=meta"], "device 'meta' is not available")
    refused(["generate", small, "--prompt", " "], "a prompt is empty")
    refused(["generate", "./list", "--prompt", "a cat"], "not a diffusers model index")
    refused(["generate", f"{small}@", "--prompt", "a cat"], "not a run directory")
    refused(["sweep", "emoji", "seed=0,1", "--name", ""], "--name is empty")
    refused(["sweep", "emoji", "seed=0,1", "--name", "a@b"], "name 'a@b'")
    (tmp_path / "words.yaml").write_text("recipe: emoji\ngrid: {sampler.negative_prompt: [no, yes]}")
    refused(["sweep", "words.yaml", "--dry-run"], "YAML reads a word of sampler.negative_prompt as False")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "config.yaml").write_text(to_yaml(load_config()))
    refused(["generate", "runs/run@", "--prompt", "a cat"], "give a step or best after the @")


def test_two_commands_into_one_directory(refused: Refused, small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        refused(["evaluate", small, "--prompts", "animals", "-o", tmp_path / "out"], "another process is writing to it")
        refused(["generate", small, "--prompt", "a", "-o", tmp_path / "out"], "another process is writing to it")


def test_a_failure_before_the_first_step_leaves_no_directory(
    refused: Refused, settings: list[str], tmp_path: Path
) -> None:
    for override in ("model.denoiser=./no.safetensors", "sampler.height=8"):
        refused(["train", *settings, override, f"output_dir={tmp_path / 'a' / 'b'}"], override.partition("=")[0])
        assert not (tmp_path / "a").exists()
    (tmp_path / "a" / "b" / "run").mkdir(parents=True)
    refused(["train", *settings, "sampler.height=8", f"output_dir={tmp_path / 'a' / 'b'}"], r"sampler\.height is 8")
    assert (tmp_path / "a" / "b" / "run").is_dir()


def test_nor_does_ctrl_c_before_the_first_step(
    draftplus: Any, settings: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(fine_tuning, "build_model", loading)
    monkeypatch.setattr(gallery, "build_model", loading)
    for arguments in (
        ["train", *settings, f"output_dir={tmp_path / 'a' / 'b'}"],
        ["generate", small, "device=cpu", "--prompt", "a cat", "-o", tmp_path / "a" / "b"],
    ):
        printed = draftplus(*arguments)
        assert printed.code == 130 and printed.err.endswith("draftplus: interrupted\n")
        assert not (tmp_path / "a").exists()


def test_a_picture_of_20000_pixels_is_left_out_of_the_report(tmp_path: Path) -> None:
    from draftplus.report.read import read_run

    samples = tmp_path / "samples" / "step-000000"
    samples.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(samples / "00-a-0.png")
    Image.new("1", (20_000, 20_000)).save(samples / "00-a-1.png")
    (tmp_path / "eval.jsonl").write_text("[" * 100_000 + "\n")
    run = read_run(tmp_path)
    assert [path.name for path in run.samples[0].values()] == ["00-a-0.png"]
    assert any("00-a-1.png (a picture too large to be read)" in one for one in run.missing)
    assert any("eval.jsonl, line 1" in one for one in run.missing)


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    hub.why_offline.cache_clear()
    hub_index.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", unknown)
    try:
        told = hub_index("nobody/nothing-like-it", None)
        assert told == (
            "model.path 'nobody/nothing-like-it': it is neither on this disk nor in the hub's cache, and "
            "huggingface.co cannot be reached: Name or service not known; hf download nobody/nothing-like-it "
            "--local-dir DIRECTORY, on a machine that reaches it; then model.path=DIRECTORY"
        )
        assert huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    finally:
        hub.why_offline.cache_clear()
        hub_index.cache_clear()


def test_an_empty_prompt_in_python(small: Path) -> None:
    with pytest.raises(UserError, match="a prompt is empty"):
        draftplus.api.generate(str(small), ["a cat", ""], [0])


def test_a_command_that_is_refused_leaves_no_directory(
    refused: Refused, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["evaluate", small, "--prompts", "animals", "--metric", "lpisp"], "did you mean 'lpips'")
    refused(["generate", small, "--prompt", "a cat", "device=meta"], "device 'meta'")
    assert list(tmp_path.iterdir()) == []
