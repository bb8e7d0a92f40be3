"""What a Slurm job is told and what is made of its end, without a Slurm; tests/cluster has the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from draftplus.errors import UserError
from draftplus.sweeps import slurm
from draftplus.sweeps.plan import Plan, plan_sweep
from draftplus.sweeps.runner import said
from draftplus.sweeps.slurm import SlurmRunner, parameters, refuse_without_slurm
from draftplus.sweeps.slurm_job import Record, Training, _seconds, read_record, record_path
from draftplus.sweeps.slurm_options import read_options

OPTIONS = "partition=gpu,time=2:00:00,gpus=2,nodes=3,cpus=8,exclusive=true,grace=90"


def test_the_script_that_sbatch_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))  # as where srun is
    executor = submitit.SlurmExecutor(tmp_path / "slurm")
    executor.update_parameters(**parameters(read_options(OPTIONS), "seed-0", "/a b/seed-0"))
    lines = executor._make_submission_file_text("train", "x").splitlines()
    given = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert given == {
        "partition=gpu", "time=2:00:00", "gpus-per-node=2", "nodes=3", "ntasks-per-node=1", "cpus-per-task=8",
        "exclusive", "signal=USR1@90", "requeue", "comment='/a b/seed-0'", "job-name=seed-0", "open-mode=append",
        f"output={tmp_path}/slurm/%j_0_log.out",
    }  # fmt: skip
    (command,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=8" in command.split() and command.endswith(" train")


def training(tmp_path: Path, nodes: int = 1, processes: int = 1) -> Training:
    return Training(tmp_path, "seed-0", ("emoji", "seed=0"), nodes, processes, 90)


def test_a_run_of_one_process_and_one_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    train = ["-m", "draftplus", "train", "--trust", "emoji", "seed=0"]
    assert training(tmp_path).command("17", 0) == [sys.executable, "-P", *train]
    first, second = (training(tmp_path, 2, 4).command("17", node) for node in (0, 1))
    assert first == [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=4", "--rdzv-id=17.2",
        "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.5:20017", "--rdzv-conf=is_host=1", *train,
    ]  # fmt: skip
    assert [part for part in second if part not in first] == ["--rdzv-conf=is_host=0"]


@pytest.mark.parametrize(
    ("left", "seconds"), [("1-02:03:04", 93784), ("2:00:00", 7200), ("1:30", 90), ("0:07", 7), ("UNLIMITED", None)]
)
def test_time_that_is_left(left: str, seconds: int | None) -> None:
    assert _seconds(left) == seconds


class Commands:
    """Stands in for squeue and scontrol on a node."""

    def __init__(self, state: str, refused: str = "") -> None:
        self.state, self.refused, self.called = state, refused, list[str]()

    def __call__(self, *command: str) -> Any:
        self.called.append(command[0])
        bad = command[0] == "scontrol" and self.refused != ""
        return type("Done", (), {"returncode": int(bad), "stdout": f"{self.state}\n", "stderr": self.refused})


@pytest.mark.parametrize(
    ("state", "refused", "stuck", "asked", "told"),
    [
        ("RUNNING|1:00:00", "", False, True, None),  # preempted
        ("RUNNING|1:00:00", "", True, True, None),  # before anything could be saved
        ("RUNNING|1:30", "", False, True, None),  # out of time
        ("RUNNING|1:30", "", True, False, "no step could be saved within the time limit"),
        ("COMPLETING|1:00:00", "", False, False, None),  # cancelled, or queued again by Slurm
        ("RUNNING|UNLIMITED", "no requeue here", False, True, "cannot be queued again: no requeue here"),
    ],
)
def test_when_a_job_queues_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    refused: str,
    stuck: bool,
    asked: bool,
    told: str | None,
) -> None:
    commands = Commands(state, refused)
    monkeypatch.setattr("draftplus.sweeps.slurm_job._run", commands)
    why = training(tmp_path)._queue_again("17", stuck)
    assert commands.called == ["squeue"] + ["scontrol"] * asked
    assert (why is None) if told is None else (why is not None and told in why)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--slurm needs submitit; run: pip install 'draftplus\[slurm\]'"):
        refuse_without_slurm()
    monkeypatch.setattr(slurm, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch, squeue, scontrol, srun not found; run it where the cluster's jobs"):
        refuse_without_slurm()


class Queue:
    """Stands in for Slurm's queue: what squeue says, and how many jobs were submitted."""

    def __init__(self) -> None:
        self.jobs: list[slurm._Queued] | None = []
        self.submitted = 0

    def submit(self, runner: SlurmRunner, run: Any) -> str:
        self.submitted += 1
        return str(100 + self.submitted)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(slurm, "refuse_without_slurm", lambda: None)
    monkeypatch.setattr(slurm, "_queue", lambda: made.jobs)
    monkeypatch.setattr(SlurmRunner, "_submit", lambda runner, run: made.submit(runner, run))
    monkeypatch.setattr(slurm, "LATE", 0.0)
    return made


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    made = plan_sweep("emoji", {"seed": ["0", "1"]}, "s", tmp_path)
    record_path(made.directory, "x").parent.mkdir(parents=True)
    return made


def write(plan: Plan, record: Record, name: str = "seed-0") -> None:
    record_path(plan.directory, name).write_text(json.dumps(record.__dict__))


def test_jobs_of_an_earlier_sweep_are_found(queue: Queue, plan: Plan) -> None:
    first, second = plan.runs
    place = (plan.directory / "seed-0").resolve()
    queue.jobs = [slurm._Queued("7", "PENDING", str(place)), slurm._Queued("6", "CANCELLED", str(place))]
    runner = SlurmRunner(plan, read_options(""))
    assert runner.start(first) and queue.submitted == 0
    assert runner.start(second) and queue.submitted == 1
    assert "scancel 7 101" in runner.farewell()
    (plan.directory / "seed-0" / "adapter").mkdir(parents=True)
    write(plan, Record("7", plan.arguments(first), 5.0, 0))
    queue.jobs = [slurm._Queued("7", "PENDING", str(place)), slurm._Queued("101", "RUNNING", "")]
    assert runner.ended() == []  # it is in the queue again
    queue.jobs = []
    ((run, told), (other, lost)) = runner.ended()
    assert (run, told.error, told.seconds) == (first, None, 5.0)
    assert other is second and lost.error is not None and "Slurm job 101 left the queue; see " in lost.error
    again = SlurmRunner(plan, read_options(""))
    assert again.start(first) and queue.submitted == 1 and again.ended()[0][1].error is None  # finished unseen
    write(plan, Record("7", ["demo"], 5.0, 0))
    assert SlurmRunner(plan, read_options("")).start(first) and queue.submitted == 2  # of other settings


def test_how_a_job_ended(queue: Queue, plan: Plan) -> None:
    def told(state: str | None, record: Record | None) -> str | None:
        runner = SlurmRunner(plan, read_options(""))
        queue.submitted = 0
        runner.start(plan.runs[0])
        record_path(plan.directory, "seed-0").unlink(missing_ok=True)
        if record is not None:
            write(plan, record)
        queue.jobs = [slurm._Queued("101", state, "")] if state else []
        ended = runner.ended()
        queue.jobs = []
        return ended[0][1].error if ended else "goes on"

    log = plan.directory / "logs" / "seed-0.txt"
    log.parent.mkdir()
    log.write_text("draftplus: reward 'x' is not finite\n")
    killed = f"killed by signal 9, perhaps for lack of memory; see {log}"
    for state, record, expected in (
        ("RUNNING", None, "goes on"), ("COMPLETING", Record("101", []), "goes on"), ("PENDING", None, "goes on"),
        ("CANCELLED", Record("101", []), f"Slurm job 101 was cancelled; see {log}"),
        ("TIMEOUT", None, f"Slurm job 101 reached its time limit; see {log}"),
        ("OUT_OF_MEMORY", None, f"Slurm job 101 ran out of memory; see {log}"),
        ("FAILED", None, f"Slurm job 101 ended with state FAILED; see {log}"),
        ("COMPLETING", Record("101", [], 1.0, 1), "reward 'x' is not finite"),
        ("FAILED", Record("101", [], 1.0, -9), killed),
        (None, Record("101", [], 1.0, 0), f"it ended without a result; see {log}"),
        (None, Record("99", [], 1.0, 1), f"Slurm job 101 left the queue; see {log}"),  # of an earlier job
        ("RUNNING", Record("101", [], 1.0, None, "cannot be queued again"), "cannot be queued again"),
    ):  # fmt: skip
        assert told(state, record) == expected, (state, record)


def test_a_queue_that_does_not_answer_ends_no_run(queue: Queue, plan: Plan) -> None:
    runner = SlurmRunner(plan, read_options(""), jobs=1)
    assert runner.start(plan.runs[0]) and not runner.start(plan.runs[1])  # as many as asked
    queue.jobs = None
    assert runner.ended() == []
    with pytest.raises(UserError, match="squeue, which lists the jobs, fails"):
        SlurmRunner(plan, read_options("")).start(plan.runs[0])
    with pytest.raises(UserError, match="jobs is 0; give at least 1"):
        SlurmRunner(plan, read_options(""), jobs=0)


def test_a_record_is_whole_or_none(tmp_path: Path) -> None:
    record_path(tmp_path, "a").parent.mkdir()
    assert read_record(tmp_path, "a") is None
    record_path(tmp_path, "a").write_text('{"job": "1"')
    assert read_record(tmp_path, "a") is None
    training(tmp_path)._write(Record("1", ["emoji"], 2.0, 0))
    assert read_record(tmp_path, "seed-0") == Record("1", ["emoji"], 2.0, 0)


def test_the_last_line_is_the_runs_own_and_not_torchruns(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    elastic = "torch/distributed/elastic/multiprocessing/api.py:9]"
    log.write_text(
        f"draftplus: the prompts are missing\nW1 {elastic} Sending process 5 closing signal SIGTERM\n"
        f"E1 {elastic} failed (exitcode: 2) local_rank: 0\nTraceback\n========\n"
    )
    assert said(log, 1) == "the prompts are missing"
    assert said(tmp_path / "none.txt", 3) == "exit status 3 without any output"
