"""Ctrl-C: no command that was stopped says that all is well, and none prints a traceback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Child, command
from tests.support.runs import REWARDS

COMMANDS = {
    "train": ["train", "emoji"],
    "train --dry-run": ["train", "emoji", "--dry-run"],
    "generate": ["generate", "emoji", "--prompt", "a cat"],
    "evaluate": ["evaluate", "emoji"],
    "report": ["report", "runs/demo"],
    "sweep": ["sweep", "emoji", "seed=0,1"],
    "sweep --dry-run": ["sweep", "emoji", "seed=0,1", "--dry-run"],
}
WORK = {
    "train": "draftplus.api.train", "train --dry-run": "draftplus.api.describe",
    "generate": "draftplus.api.write_images", "evaluate": "draftplus.api.evaluate",
    "report": "draftplus.report.write_report", "sweep": "draftplus.api.run_planned",
    "sweep --dry-run": "draftplus.sweeps.plan.plan_sweep",
}  # fmt: skip


@pytest.fixture(autouse=True)
def handler() -> Any:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(draftplus: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A real signal, wherever the command is at work: one line, and the status that shells expect."""

    def work(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("it went on")

    monkeypatch.setattr(WORK[name], work)
    printed = draftplus(*COMMANDS[name])
    assert (printed.code, printed.out, printed.err) == (130, "", "draftplus: interrupted\n")


def test_a_command_that_ends_leaves_the_handler(draftplus: Callable[..., Any]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert draftplus("--version").code == 0
    assert signal.getsignal(signal.SIGINT) is before


def generating(small: Path, directory: Path) -> Child:
    """A command that waits in its reward, and cleans up for as long when it is interrupted."""
    (directory / "wait-in-evaluation").touch()
    child = command(
        ["generate", str(small), "--prompt", "a cat", "--reward", f"{REWARDS}:stubborn", "sampler.steps=1",
         "device=cpu", "--seeds", "0"],
        directory,
    )  # fmt: skip
    child.wait_until((directory / "waiting").exists)
    return child


@pytest.mark.slow
def test_a_second_one_ends_it_at_once(small: Path, tmp_path: Path) -> None:
    child = generating(small, tmp_path)
    child.signal(signal.SIGINT)
    child.wait_until((tmp_path / "cleaning").exists)
    began = time.monotonic()
    child.signal(signal.SIGINT)
    assert child.wait() in (130, -signal.SIGINT)
    assert time.monotonic() - began < 20
    assert "Traceback" not in child.err.read_text()
