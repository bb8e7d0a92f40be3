"""No process is left waiting for one that hangs, died, failed or was asked to stop; and none is given up that works."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from draftplus.cli.failures import in_one_line
from draftplus.distributed.joining import agreed_name
from draftplus.distributed.meeting import At, Watched
from draftplus.errors import Stalled
from tests.support import meetings
from tests.support.processes import Child, commands, ranks
from tests.support.runs import REWARDS, fingerprint, rows

pytestmark = pytest.mark.slow


def started(target: Callable[[], None], directory: Path) -> list[Child]:
    return ranks(target, [], directory, 2)


def test_who_gets_on_is_waited_for(tmp_path: Path) -> None:
    """As the others wait for one that evaluates: for longer than parallel.timeout, while it shows progress."""
    children = started(meetings.busy_for_long, tmp_path)
    assert [child.wait() for child in children] == [0, 0], children[0].err.read_text()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (meetings.hang, ["has shown no progress for 0.05 minutes", "gathering", "'a work without end'"]),
        (meetings.stand_still, ["has given no sign of life for 0.05 minutes", "end of"]),
    ],
)
def test_who_does_not_get_on_ends_all(what: Callable[[], None], words: list[str], tmp_path: Path) -> None:
    children, began = started(what, tmp_path), time.monotonic()
    try:
        assert children[0].wait() == 1
        assert time.monotonic() - began < 60
        told = children[0].err.read_text()
        assert "Stalled: rank 1 on " in told
        for word in words:
            assert word in told
        if what is meetings.hang:  # it knows itself, though its main thread cannot be reached
            assert children[1].wait() == 1
            assert "rank 1 on" in children[1].err.read_text()
    finally:
        children[1].signal(signal.SIGKILL) if children[1].process.is_alive() else None


def test_a_mistake_of_one_ends_all(tmp_path: Path) -> None:
    children = started(meetings.fail, tmp_path)
    assert [child.wait(30) for child in children] == [1, 1]
    assert "ended: a mistake that only this process sees" in children[0].err.read_text()


def test_the_store_forgets(tmp_path: Path) -> None:
    children = started(meetings.meet_often, tmp_path)
    assert [child.wait() for child in children] == [0, 0], children[0].err.read_text()


def test_a_process_that_does_not_start() -> None:
    with pytest.raises(Stalled, match=r"2 of 3 processes did not start in 0\.005 minutes: rank 1, 2"):
        agreed_name(HashStore(), 0, 3, 0.3)
    with pytest.raises(Stalled, match=r"1 of 3 processes did not start in 0\.005 minutes: rank 0"):
        agreed_name(HashStore(), 1, 3, 0.3)


def test_processes_that_are_started_again_know_only_one_another() -> None:
    """In the store of those before, some of which did not get far."""
    store, names = HashStore(), list[str]()
    with pytest.raises(Stalled):
        agreed_name(store, 1, 3, 0.1)
    for size in (3, 3, 2):
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda rank, size=size: agreed_name(store, rank, size, 20.0), range(size)))
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_stall_is_told_in_one_line() -> None:
    assert in_one_line(Stalled("rank 1 hangs")) == "rank 1 hangs"


def test_signs() -> None:
    """A sign that changes is one of life; of progress only with another number of beats."""
    other = Watched()
    for told, quiet, silent in [
        ('[1, "host", "this", 1, [0, "works", ""]]', 0.0, 0.0),
        ('[1, "host", "this", 1, [0, "works", ""]]', 0.5, 0.5),
        ('[2, "host", "this", 1, [0, "works", ""]]', 1.0, 0.0),
        ('[3, "host", "that", 2, [1, "works", ""]]', 0.0, 0.0),
    ]:
        other.look(told, 0.5)
        assert (other.quiet, other.silent) == (quiet, silent)
    assert other.at.before(At(1, "waits")) and not other.at.before(At(0, "waits"))
    assert not At(1, "waits").before(At(1, "waits"))


@pytest.fixture(scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {}


SETTINGS = (f"reward={REWARDS}:patient", "checkpoint.every=100", "optim.ema=0.5", "eval.every=2")


@pytest.fixture
def whole(settings: list[str], tmp_path: Path, _whole: dict[str, str]) -> str:
    """The fingerprint of a run that nobody interrupted."""
    if not _whole:
        for child in (children := commands(["train", *settings, *SETTINGS, "name=whole"], tmp_path / "whole", 2)):
            assert child.wait() == 0, children[0].err.read_text()
        _whole["fingerprint"] = fingerprint(tmp_path / "runs" / "whole")
    return _whole["fingerprint"]


@pytest.mark.parametrize(("when", "told"), [("training", 0), ("training", 1), ("evaluation", 0)])
def test_a_stop_of_one_stops_all(settings: list[str], tmp_path: Path, whole: str, when: str, told: int) -> None:
    """SIGTERM to one rank alone, be it the one that works (1) or the one that waits for it (0)."""
    directory, run = tmp_path / "stopped", tmp_path / "runs" / "run"
    children = commands(["train", *settings, *SETTINGS], directory, 2)
    file = run / ("metrics.jsonl" if when == "training" else "eval.jsonl")
    children[0].wait_until(lambda: file.exists() and len(file.read_text().splitlines()) >= 1)
    (directory / "rank1" / f"wait-in-{when}").touch()
    children[1].wait_until((directory / "rank1" / "waiting").exists)
    began = time.monotonic()
    children[told].signal(signal.SIGTERM)
    assert [child.wait(30) for child in children] == [1, 1]
    assert time.monotonic() - began < 20  # seconds even on a busy machine
    said = children[0].err.read_text()
    assert "continue with: draftplus train" in said and "Traceback" not in said
    done = len(rows(run / "metrics.jsonl"))
    assert done >= 1 and (run / "checkpoints" / f"step-{done:06d}").is_dir()
    if when == "training":
        for child in (again := commands(["train", *settings, *SETTINGS], tmp_path / "again", 2)):
            assert child.wait() == 0, again[0].err.read_text()
        assert fingerprint(run) == whole


def test_a_hanging_rank_ends_the_run(settings: list[str], tmp_path: Path) -> None:
    """With its reason, and what is complete on the others is saved."""
    directory, run = tmp_path / "hanging", tmp_path / "runs" / "run"
    children = commands(["train", *settings, *SETTINGS, "parallel.timeout=0.1"], directory, 2)
    metrics = run / "metrics.jsonl"
    children[0].wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 1)
    (directory / "rank1" / "wait-in-training").touch()
    assert [child.wait() for child in children] == [1, 1]
    said = children[0].err.read_text()
    assert "draftplus: rank 1 on " in said and "(parallel.timeout), at 'training, " in said and "Traceback" not in said
    assert len(said.splitlines()) <= 4, said
    done = len(rows(metrics))
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()


def test_parts_are_stopped_together(settings: list[str], tmp_path: Path) -> None:
    """Where the processes hold parts of the denoiser, none may leave a pass alone, and all save the same step."""
    more = ["parallel.mode=shard", "model.lora=null", "optim.lr=1e-4", "train.steps=200", "checkpoint.every=1000"]
    children = commands(["train", *settings, *more, "eval.every=1000"], tmp_path / "stopped", 2)
    run = tmp_path / "runs" / "run"
    children[0].wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows(run / "metrics.jsonl")) >= 2)
    children[1].signal(signal.SIGTERM)
    assert [child.wait(30) for child in children] == [1, 1], children[0].err.read_text()
    done = len(rows(run / "metrics.jsonl"))
    assert 2 <= done < 200 and (run / "checkpoints" / f"step-{done:06d}").is_dir()
    again = ["train", *settings, *more, f"eval.every={done + 1}", f"train.steps={done + 1}"]
    for child in (children := commands(again, tmp_path / "again", 2)):
        assert child.wait() == 0, children[0].err.read_text()
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == list(range(1, done + 2))
