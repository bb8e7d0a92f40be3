"""Two processes do what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import ROOT, commands, ranks
from tests.support.runs import REWARDS, fingerprint, relative, rows, train_here, update_of, weights
from tests.support.steps import BATCH, OBJECTIVES, REUSE, take_steps, take_steps_on_a_rank
from tests.tiny import randomize, tiny_model

STEPS = 3


@pytest.fixture(scope="module")
def on_two_ranks(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Each method's steps in float64, by rank."""
    directory = tmp_path_factory.mktemp("ranks")
    children = ranks(take_steps_on_a_rank, [str(tiny_path), STEPS], directory, 2)
    assert [child.wait() for child in children] == [0, 0]
    return [torch.load(directory / f"rank{rank}" / "updates.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", OBJECTIVES)
def test_two_ranks_equal_one(tiny_path: Path, on_two_ranks: list[dict[str, dict[str, Any]]], method: str) -> None:
    model = tiny_model(tiny_path)
    randomize(model)
    alone = take_steps(model, OBJECTIVES[method], BATCH, None, steps=STEPS, keeps=False)
    for rank, results in enumerate(on_two_ranks):
        assert relative(results[method]["update"], alone.update) < 1e-9
        for name, value in results[method]["metrics"].items():
            assert value == pytest.approx(alone.metrics[name], rel=1e-9, abs=1e-15), name
        assert results[method]["windows"] == alone.windows
        share = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        assert results[method]["prompts"] == [prompts[share] for prompts in alone.prompts]
        assert results[method]["known"] == ([False, True, False] if method in REUSE else [])
        assert not any(alone.known)
    first, second = (results[method]["update"] for results in on_two_ranks)
    assert torch.equal(first, second)


@pytest.mark.slow
def test_ranks_share_the_prompts_without_overlap(on_two_ranks: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (results["draft"]["prompts"] for results in on_two_ranks)
    for mine, others in zip(first, second, strict=True):
        assert not set(mine) & set(others)
        assert len(mine) == len(others) == BATCH // 2


@pytest.mark.slow
def test_random_windows_are_the_same_on_all_ranks(on_two_ranks: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (results["alignprop"]["windows"] for results in on_two_ranks)
    assert first == second
    assert len(set(first)) > 1, "these steps drew one window only, which shows nothing"


def assert_nearly_equal(run: Path, alone: Path) -> None:
    """In float32, where the order of sums shows."""
    base = weights(alone / "adapters" / "step-000000")
    for directory in ("adapter", "adapters/step-000002"):
        moved = update_of(base, weights(alone / directory))
        assert relative(update_of(base, weights(run / directory)), moved) < 1e-3
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = rows(run / name), rows(alone / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"per_image", "lpips_per_prompt"}:
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
            for key in mine.keys() & {"per_image", "lpips_per_prompt"}:
                assert mine[key].keys() == other[key].keys()
                for name in mine[key]:
                    assert mine[key][name] == pytest.approx(other[key][name], rel=1e-3, abs=1e-5), name
    pictures = [sorted(p.relative_to(r) for p in (r / "samples").rglob("*.png")) for r in (run, alone)]
    assert pictures[0] == pictures[1]


@pytest.fixture
def settings_of_two(settings: list[str]) -> list[str]:
    more = ["objective.kl_coeff=0.5", "eval.every=2", "train.micro_batch_size=2", "optim.ema=0.5"]
    return [*settings, f"reward={REWARDS}:by_prompt", *more]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_ranks_end_with_their_launcher(settings_of_two: list[str], tmp_path: Path) -> None:
    """torchrun is killed, and cannot tell them: they save their state and leave, instead of training on unseen."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = ["--nproc_per_node=2", "--standalone", "-m", "draftplus", "train", *settings_of_two, "train.steps=100000"]
    with (tmp_path / "said.txt").open("w") as said:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command, "eval.every=100000"], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip
    run, end, started = tmp_path / "runs" / "run", time.monotonic() + 120, list[int]()
    try:
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "said.txt").read_text()
            time.sleep(0.05)
        started = _children(launcher.pid)
        assert len(started) == 2
        launcher.kill()
        launcher.wait()
        while any(map(_is_there, started)):
            assert time.monotonic() < end, "the ranks are still there"
            time.sleep(0.05)
    finally:
        for process in [launcher.pid, *_children(launcher.pid), *filter(_is_there, started)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert "continue with: draftplus train" in (tmp_path / "said.txt").read_text()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (run / "checkpoints" / f"step-{steps[-1]:06d}").is_dir()


def _children(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def _is_there(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_torchrun(settings_of_two: list[str], tmp_path: Path) -> None:
    """The real thing, in float32: weights, metrics and evaluation equal one process's."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "draftplus",
         "train", *settings_of_two, "name=two"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=280)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)  # its workers too
    assert started.returncode == 0, err
    assert out.count("report:") == 1, "one rank prints"
    assert_nearly_equal(tmp_path / "runs" / "two", train_here(settings_of_two, "name=alone"))


@pytest.mark.slow
def test_another_number_of_ranks_may_continue(settings_of_two: list[str], tmp_path: Path) -> None:
    alone = train_here(settings_of_two, "name=alone")
    train_here(settings_of_two, "name=run", "train.steps=2")
    children = commands(["train", *settings_of_two, "name=run"], tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0]
    assert_nearly_equal(tmp_path / "runs" / "run", alone)


@pytest.mark.slow
def test_default_batches_fit_two_ranks(settings: list[str], tmp_path: Path) -> None:
    """A rank's share may be smaller than a micro-batch."""
    children = commands(["train", *settings, "train.steps=1"], tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0]


@pytest.mark.slow
def test_a_batch_that_ranks_do_not_divide(settings: list[str], tmp_path: Path) -> None:
    children = commands(["train", *settings, "train.global_batch_size=3", "train.micro_batch_size=1"], tmp_path, 2)
    assert [child.wait() for child in children] == [2, 2]
    for child in children:
        assert "ranks" in child.err.read_text()
        assert "Traceback" not in child.err.read_text()
        assert len(child.err.read_text().splitlines()) <= 2


@pytest.mark.slow
def test_a_stop_reaches_all_ranks(settings: list[str], tmp_path: Path) -> None:
    """SIGTERM, as torchrun passes it on; what is complete is saved, and continuing gives the uninterrupted result."""
    settings = [*settings, f"reward={REWARDS}:patient", "checkpoint.every=100", "optim.ema=0.5"]
    for child in (reference := commands(["train", *settings, "name=whole"], tmp_path / "whole", 2)):
        assert child.wait() == 0, reference[0].err.read_text()
    directory = tmp_path / "stopped"
    children = commands(["train", *settings], directory, 2)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    children[0].wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 1)
    for rank in range(2):
        (directory / f"rank{rank}" / "wait-in-training").touch()
    for rank in range(2):
        children[rank].wait_until((directory / f"rank{rank}" / "waiting").exists)
    began = time.monotonic()
    for child in children:
        child.signal(signal.SIGTERM)
    assert [child.wait() for child in children] == [1, 1]
    assert time.monotonic() - began < 20  # seconds even on a busy machine
    assert "continue with" in children[0].err.read_text()
    done = len(metrics.read_text().splitlines())
    assert (tmp_path / "runs" / "run" / "checkpoints" / f"step-{done:06d}").is_dir()
    for child in (again := commands(["train", *settings], tmp_path / "again", 2)):
        assert child.wait() == 0, again[0].err.read_text()
    assert fingerprint(tmp_path / "runs" / "run") == fingerprint(tmp_path / "runs" / "whole")


@pytest.mark.slow
def test_ranks_refuse_alike(settings: list[str], tmp_path: Path) -> None:
    """A reward that is not finite at the first step ends both, rather than leaving one to wait for the other."""
    children = commands(["train", *settings, f"reward={REWARDS}:always_nan"], tmp_path, 2)
    assert [child.wait() for child in children] == [2, 2]
    assert "always_nan" in children[0].err.read_text()
