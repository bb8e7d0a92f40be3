"""A sweep on a real Slurm of this machine: jobs die, are preempted and queued again, and the runs are those of a local
sweep, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from draftplus.errors import Interrupted, UserError
from draftplus.sweeps import launch, local, slurm
from draftplus.sweeps.local import LocalRunner
from draftplus.sweeps.manifest import read_manifest
from draftplus.sweeps.plan import Plan, plan_sweep
from draftplus.sweeps.slurm import SlurmRunner
from draftplus.sweeps.slurm_job import read_record
from draftplus.sweeps.slurm_options import read_options
from tests.cluster.slurm import Unavailable
from tests.cluster.slurm import slurm as real_slurm
from tests.support.runs import REWARDS, fingerprint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SEEDS = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if find_spec("submitit") is None:
        pytest.skip("submitit is not installed")
    try:
        with real_slurm() as environment:
            yield environment
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def on_cluster(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))
    monkeypatch.setattr(slurm, "BETWEEN_LOOKS", 0.3)
    monkeypatch.setattr(slurm, "LATE", 3.0)
    monkeypatch.setattr(local, "BETWEEN_LOOKS", 0.1)
    monkeypatch.chdir(tmp_path)


def plan(recipe: str, name: str, *seeds: str, **more: str) -> Plan:
    grid = {"seed": [*seeds], "reward": [f"{REWARDS}:held"], **{key: [value] for key, value in more.items()}}
    return plan_sweep(recipe, grid, name, Path("sweeps"))


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def steps(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def job(planned: Plan, seed: int) -> str:
    record = read_record(planned.directory, planned.runs[seed].name)
    assert record is not None
    return record.job


def state(number: str) -> str:
    return said("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T").strip()


def restarts(number: str) -> int:
    return int(said("scontrol", "show", "job", number).partition("Restarts=")[2].split()[0])


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def kill(name: str) -> None:
    """The training of a run and what waits for it, without a word, as lack of memory does."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_text().split("\0")
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "draftplus" in words and f"name={name}" in words:
            os.kill(parent, signal.SIGKILL)
            os.kill(int(directory.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process trains {name}")


def statuses(planned: Plan) -> list[str]:
    manifest = read_manifest(planned.directory)
    assert manifest is not None
    return [entry.status for entry in manifest.runs]


def meanwhile(action: Callable[[], Any]) -> Callable[[], None]:
    """Does something in a thread. Returns what waits for it, and fails where it did."""
    failed: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)
            Path("hold").unlink(missing_ok=True)  # so that nothing waits for what does not come

    thread = threading.Thread(target=act)
    thread.start()

    def join() -> None:
        thread.join()
        assert not failed, failed

    return join


@pytest.mark.timeout(600)
def test_jobs_that_die_are_cancelled_or_queued_again_leave_what_a_local_sweep_does(
    on_cluster: None, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    planned = plan(settings[0], "cluster", *SEEDS)
    runs = [planned.directory / run.name for run in planned.runs]
    Path("hold").touch()

    def stop_waiting() -> None:
        wait_for(lambda: all(steps(run) == 2 for run in runs))
        os.kill(os.getpid(), signal.SIGINT)

    join = meanwhile(stop_waiting)
    with pytest.raises(Interrupted):  # Ctrl-C
        launch.run_sweep(planned, SlurmRunner(planned, read_options("time=10,cpus=2")))
    join()
    numbers = [job(planned, seed) for seed in range(4)]
    told = f"the jobs go on (scancel {' '.join(numbers)} ends them); repeat the command"
    assert told in capsys.readouterr().err
    assert [state(number) for number in numbers] == ["RUNNING"] * 4 and statuses(planned) == ["running"] * 4

    def disturb() -> None:
        kill(planned.runs[0].name)
        said("scontrol", "requeue", numbers[1])
        said("scancel", "--signal=USR1", numbers[2])  # as Slurm warns before it preempts a job, or ends it
        said("scancel", numbers[3])
        wait_for(lambda: all(restarts(number) == 1 for number in numbers[1:3]))
        wait_for(lambda: state(numbers[3]) == "CANCELLED")
        assert [steps(run) for run in runs] == [2, 2, 2, 2]
        Path("hold").unlink()

    join = meanwhile(disturb)
    launch.run_sweep(planned, SlurmRunner(planned, read_options("time=10,cpus=2")))  # finds the same jobs
    join()
    manifest = read_manifest(planned.directory)
    assert manifest is not None
    assert statuses(planned) == ["failed", "finished", "finished", "failed"], [run.error for run in manifest.runs]
    assert f"Slurm job {numbers[0]} ended with state FAILED; see " in (manifest.runs[0].error or "")
    assert f"Slurm job {numbers[3]} was cancelled; see " in (manifest.runs[3].error or "")
    assert [job(planned, seed) for seed in range(4)] == numbers
    assert [restarts(number) for number in numbers] == [0, 1, 1, 0]

    launch.run_sweep(planned, SlurmRunner(planned, read_options("time=10,cpus=2")))
    assert statuses(planned) == ["finished"] * 4
    assert {job(planned, 0), job(planned, 3)}.isdisjoint(numbers)
    assert [job(planned, seed) for seed in (1, 2)] == numbers[1:3]

    here = plan(settings[0], "here", *SEEDS)
    launch.run_sweep(here, LocalRunner(here, 2))
    assert statuses(here) == ["finished"] * 4
    assert [fingerprint(run) for run in runs] == [fingerprint(here.directory / run.name) for run in here.runs]
    assert len({fingerprint(run) for run in runs}) == 4


@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_goes_on_after_a_warning(on_cluster: None, settings: list[str]) -> None:
    planned = plan(settings[0], "nodes", "0", **{"train.micro_batch_size": "2"})
    run = planned.directory / planned.runs[0].name
    Path("hold").touch()

    def warn() -> None:
        wait_for(lambda: steps(run) == 2)
        number = job(planned, 0)
        said("scancel", "--signal=USR1", number)
        wait_for(lambda: restarts(number) == 1)
        assert (run / "checkpoints" / "step-000002").is_dir()
        Path("hold").unlink()

    join = meanwhile(warn)
    launch.run_sweep(planned, SlurmRunner(planned, read_options("nodes=2")))
    join()
    manifest = read_manifest(planned.directory)
    assert manifest is not None and statuses(planned) == ["finished"], manifest.runs[0].error
    assert restarts(job(planned, 0)) == 1 and steps(run) == 4


def test_what_sbatch_refuses(on_cluster: None, settings: list[str]) -> None:
    planned = plan(settings[0], "wrong", "0")
    with pytest.raises(UserError, match=r"sbatch refuses the job of .*: sbatch: error: invalid partition.*nowhere"):
        launch.run_sweep(planned, SlurmRunner(planned, read_options("partition=nowhere")))
    assert statuses(planned) == ["pending"]
