"""The process that makes itself ready while a sweep is planned becomes the first run, and nothing else of it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from draftplus import __version__
from draftplus.sweeps import ahead, launch, local
from draftplus.sweeps.ahead import Ahead, ready_ahead
from draftplus.sweeps.local import LocalRunner, environment
from draftplus.sweeps.plan import plan_sweep
from tests.support.runs import fingerprint, train_here

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from draftplus.cli.ahead import main; main()"
PATIENCE = 120


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process cannot import the libraries, which it leaves to the run to tell."""
    monkeypatch.setattr(ahead, "COMMAND", (sys.executable, "-P", "-c", WITHOUT_TORCH))


def started() -> Ahead:
    return Ahead(environment({}))


def process_of(waiting: Ahead) -> subprocess.Popen[bytes]:
    assert waiting._process is not None
    return waiting._process


def test_it_runs_a_command_and_prints_to_the_log(tmp_path: Path, quick: None) -> None:
    log = tmp_path / "log.txt"
    log.write_text("of an earlier attempt")
    process = started().train(["--version"], environment({}), log)
    assert process is not None and process.wait(PATIENCE) == 0
    assert log.read_text() == f"draftplus {__version__}\n"


def test_a_mistake_ends_it_as_the_command_ends(tmp_path: Path, quick: None) -> None:
    log = tmp_path / "log.txt"
    process = started().train(["train", "emojy"], environment({}), log)
    assert process is not None and process.wait(PATIENCE) == 2
    assert "did you mean 'emoji'" in log.read_text() and "Traceback" not in log.read_text()


def test_what_it_could_not_import_the_run_tells(tmp_path: Path, quick: None) -> None:
    log = tmp_path / "log.txt"
    process = started().train(["train", "emoji", f"output_dir={tmp_path}"], environment({}), log)
    assert process is not None and process.wait(PATIENCE) == 1
    assert "torch" in log.read_text()


def test_in_another_environment_it_is_not_used(tmp_path: Path, quick: None) -> None:
    waiting = started()
    process = process_of(waiting)
    assert waiting.train(["--version"], environment({"CUDA_VISIBLE_DEVICES": "1"}), tmp_path / "log.txt") is None
    assert process.poll() is not None and not (tmp_path / "log.txt").exists()


def test_one_that_died_is_not_used(tmp_path: Path, quick: None) -> None:
    waiting = started()
    process_of(waiting).kill()
    process_of(waiting).wait()
    assert waiting.train(["--version"], environment({}), tmp_path / "log.txt") is None


def test_it_is_used_once_and_leaves_with_the_sweep(tmp_path: Path, quick: None) -> None:
    with ready_ahead(environment({})) as waiting:
        process = waiting._process
    assert waiting._process is None and (process is None or process.poll() is not None)
    waiting = started()
    first = waiting.train(["--version"], environment({}), tmp_path / "log.txt")
    assert first is not None and waiting.train(["--version"], environment({}), tmp_path / "log.txt") is None
    waiting.dismiss()
    assert first.wait(PATIENCE) == 0  # the run is not the sweep's to end any more
    gone = process_of(started())
    assert gone.stdin is not None
    gone.stdin.close()  # as where the sweep is killed
    assert gone.wait(PATIENCE) == 0


def test_with_one_core_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with ready_ahead(environment({})) as waiting:
        assert waiting._process is None


@pytest.mark.slow
def test_its_run_is_the_run_that_a_process_of_its_own_makes(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "."]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(local, "BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(local, "_process", None)  # by which it would be started in the usual way
    planned = plan_sweep(settings[0], {"seed": ["1"], "train.steps": ["2"]}, "s", tmp_path / "sweeps")
    manifest = launch.run_sweep(planned, LocalRunner(planned, 1, started()))
    assert [entry.status for entry in manifest.runs] == ["finished"], manifest
    alone = train_here(settings, "seed=1", "train.steps=2")
    assert fingerprint(tmp_path / "sweeps" / "s" / planned.runs[0].name) == fingerprint(alone)
