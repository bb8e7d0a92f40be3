"""`draftplus sweep` and `draftplus report` print what they made, and say in their exit status whether all went well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from draftplus.report import write
from draftplus.sweeps import ahead, local
from tests.report.synthetic import write_run, write_sweep

Command = Callable[..., Any]
STAND_IN = Path(__file__).parents[1] / "sweeps" / "stand_in.py"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are those of a program that stands for `draftplus train`, and none makes itself ready before."""
    monkeypatch.setattr(local, "COMMAND", (sys.executable, str(STAND_IN)))
    monkeypatch.setattr(ahead, "ready_ahead", lambda environment: nullcontext())


def test_a_dry_run_lists_the_runs_and_makes_nothing(
    draftplus: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = draftplus("sweep", "emoji", "objective.kl_coeff=0,1", "seed=0,1", "train.steps=10", "--dry-run")
    assert (printed.code, printed.err) == (0, "")
    *runs, summary = printed.out.splitlines()
    assert runs[3] == "kl_coeff-1_seed-1  objective.kl_coeff=1 seed=1 train.steps=10"
    assert summary.startswith("4 runs, 40 steps: sweeps/emoji-")
    assert list(tmp_path.iterdir()) == []


def test_slurms_options_are_checked_before_anything_is_made(
    draftplus: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = draftplus("sweep", "emoji", "seed=0,1", "--dry-run", "--slurm", "partition=gpu,gpus=2,time=30")
    assert printed.code == 0
    last = "each is a Slurm job: sbatch --nodes=1 --partition=gpu --gpus-per-node=2 --time=30"
    assert printed.out.splitlines()[-1] == last
    printed = draftplus("sweep", "emoji", "seed=0,1", "--slurm", "gpus=two")
    assert printed.code == 2 and printed.err.startswith("draftplus: --slurm gpus=two: give the number of GPUs")
    monkeypatch.setenv("PATH", "/nowhere")
    printed = draftplus("sweep", "emoji", "seed=0,1", "--slurm", "gpus=2")
    assert printed.code == 2 and printed.err.startswith("draftplus: --slurm") and printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_failed_run_is_told_at_the_end(draftplus: Command, tmp_path: Path, monkeypatch: Any, stand_in: None) -> None:
    monkeypatch.chdir(tmp_path)
    (write_run(tmp_path / "sweeps" / "s" / "seed-0", pictures=False) / "adapter").rmdir()
    printed = draftplus("sweep", "emoji", "seed=0,1", "--name", "s")
    assert printed.code == 1
    assert printed.out == "1 of 2 runs finished: sweeps/s\nreport:  sweeps/s/report.html\n"
    assert printed.err == "failed: seed-1: reward 'x' is not finite; look at it\n"
    page = (tmp_path / "sweeps" / "s" / "report.html").read_text()
    assert "seed-1: failed: reward" in page
    (tmp_path / "sweeps" / "s" / "seed-1" / "mended").touch()
    assert draftplus("sweep", "emoji", "seed=0,1", "--name", "s").code == 0


def test_a_sweep_that_made_nothing_has_no_report(
    draftplus: Callable[..., Any], tmp_path: Path, monkeypatch: Any, stand_in: None
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = draftplus("sweep", "emoji", "seed=1", "--name", "s")
    assert printed.code == 1 and printed.out == "0 of 1 runs finished: sweeps/s\n"


@pytest.mark.slow
def test_reports_are_written_where_they_belong(draftplus: Command, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "a", steps=2, every=1, prompts=["an owl"], pictures=False)
    assert draftplus("report", "runs/a").out == "runs/a/report.html\n" and (run / "figures").is_dir()
    write_sweep(tmp_path / "sweeps" / "s", seeds=(0,), pictures=False)
    assert draftplus("report", "runs/a", "sweeps/s", "-o", "both/page.html").out == "both/page.html\n"
    assert (tmp_path / "both" / "figures" / "trade-off.png").is_file()
    monkeypatch.setattr(write.comparison.Report, "save", lambda *_: [])
    assert draftplus("report", "sweeps/s").out == "sweeps/s/report.html\n"
    assert draftplus("report", "runs/a", "sweeps/s").out == "report.html\n"
