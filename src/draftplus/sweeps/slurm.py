"""Runs as jobs of a cluster, by submitit. Slurm's queue is what knows the jobs: whoever asks it finds them again."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from draftplus.errors import UserError, notice
from draftplus.sweeps.plan import Plan, PlannedRun
from draftplus.sweeps.runner import Ending, ending, log_path
from draftplus.sweeps.slurm_job import JOBS, WARNING, Record, Training, read_record, record_path
from draftplus.sweeps.slurm_options import SlurmOptions

BETWEEN_LOOKS = 5.0  # seconds; squeue asks one controller for the whole cluster
LATE = 30.0  # seconds that a shared file system may take to show what a node has written
OVER = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
SILENT = {"CANCELLED": "was cancelled", "TIMEOUT": "reached its time limit", "OUT_OF_MEMORY": "ran out of memory"}
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # they say which Slurm, not which job


@dataclass
class _Job:
    """A run's job. gone: when the queue was first without it or said that it is over; None: it is not."""

    run: PlannedRun
    number: str
    gone: float | None = None


class SlurmRunner:
    """jobs: how many are in the queue at the same time; None: all.

    Raises UserError where submitit or Slurm's commands are missing, or `jobs` is below 1.
    """

    def __init__(self, plan: Plan, options: SlurmOptions, jobs: int | None = None) -> None:
        refuse_without_slurm()
        if jobs is not None and jobs < 1:
            raise UserError(f"jobs is {jobs}; give at least 1")
        self._plan, self._options, self._most = plan, options, jobs
        self._active: list[_Job] = []
        self._found: dict[str, str] | None = None  # comment -> job, of an earlier sweep

    @property
    def between_looks(self) -> float:
        return BETWEEN_LOOKS

    def start(self, run: PlannedRun) -> bool:
        """Submits a job, unless the queue has one for this run, or the last one has finished it unseen."""
        if self._most is not None and len(self._active) >= self._most:
            return False
        if self._found is None:
            queue = _queue()
            if queue is None:
                raise UserError("squeue, which lists the jobs, fails; try again when it works")
            self._found = {job.comment: job.number for job in queue if job.state not in OVER}
        record = read_record(self._plan.directory, run.name)
        number = self._found.get(self._comment(run))
        if number is None and record is not None and self._finished(run, record):
            number = record.job
        self._active.append(_Job(run, number if number is not None else self._submit(run)))
        return True

    def ended(self) -> list[tuple[PlannedRun, Ending]]:
        queue = _queue()
        if queue is None:  # the controller is away for a moment; the jobs are not
            return []
        states = {job.number: job.state for job in queue}
        over = []
        for job in list(self._active):
            told = self._told(job, states.get(job.number))
            if told is not None:
                self._active.remove(job)
                over.append((job.run, told))
        return over

    def leave(self) -> list[tuple[PlannedRun, Ending]]:
        """Jobs go on without the sweep."""
        return []

    def farewell(self) -> str:
        numbers = " ".join(job.number for job in self._active)
        jobs = f"the jobs go on (scancel {numbers} ends them); " if numbers else ""
        return f"{jobs}repeat the command to wait for the rest"

    def _told(self, job: _Job, state: str | None) -> Ending | None:
        """How a job ended; None where it has not, or its nodes may yet say how."""
        if state == "PENDING":  # again, perhaps
            job.gone = None
            return None
        record = read_record(self._plan.directory, job.run.name)
        if record is not None and record.job != job.number:
            record = None
        seconds = record.seconds if record is not None else 0.0
        if record is not None and record.error is not None:
            return Ending(record.error, seconds)
        if record is not None and record.code is not None:
            return ending(self._plan, job.run, record.code, seconds)
        if state is not None and state not in OVER:
            job.gone = None
            return None
        job.gone = job.gone or time.monotonic()
        waited = time.monotonic() - job.gone
        # one that is queued again passes through a state that looks like its end
        if waited < (min(LATE, 2 * BETWEEN_LOOKS) if state in SILENT else LATE):
            return None
        how = SILENT.get(state or "", f"ended with state {state}" if state else "left the queue")
        return Ending(f"Slurm job {job.number} {how}; see {log_path(self._plan.directory, job.run.name)}", seconds)

    def _submit(self, run: PlannedRun) -> str:
        import submitit

        directory, options = self._plan.directory.absolute(), self._options
        record_path(directory, run.name).unlink(missing_ok=True)
        executor = submitit.SlurmExecutor(directory / JOBS, python=f"{shlex.quote(sys.executable)} -P")
        executor.update_parameters(**parameters(options, run.name, self._comment(run)))
        training = Training(
            directory, run.name, tuple(self._plan.arguments(run)), options.nodes, options.processes, options.grace
        )
        try:
            with _outside_of_a_job():
                return str(executor.submit(training).job_id)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line] or [str(error)]
            told = f"sbatch refuses the job of {run.name}: {'; '.join(lines)}"
            going = " ".join(job.number for job in self._active)
            raise UserError(f"{told}. Jobs submitted before go on: {going}" if going else told) from None

    def _finished(self, run: PlannedRun, record: Record) -> bool:
        same = record.arguments == self._plan.arguments(run) and record.code is not None
        return same and ending(self._plan, run, record.code or 0, 0.0).error is None

    def _comment(self, run: PlannedRun) -> str:
        return str((self._plan.directory / run.name).resolve())


def parameters(options: SlurmOptions, name: str, comment: str) -> dict[str, Any]:
    """What submitit is told of a job: one task on each node, which starts the processes there."""
    sbatch = {
        **options.sbatch, "signal": f"{WARNING.name.removeprefix('SIG')}@{options.grace}", "requeue": True,
        "comment": comment,
    }  # fmt: skip
    cpus = options.sbatch.get("cpus-per-task")
    return {
        "job_name": name, "nodes": options.nodes, "ntasks_per_node": 1, "time": None, "wckey": None,
        "srun_args": [f"--cpus-per-task={cpus}"] if cpus else None,  # srun does not inherit it since 22.05
        "stderr_to_stdout": True, "additional_parameters": sbatch,
    }  # fmt: skip


def refuse_without_slurm() -> None:
    """Raises UserError where submitit or Slurm's commands are missing."""
    if find_spec("submitit") is None:
        raise UserError("--slurm needs submitit; run: pip install 'draftplus[slurm]'")
    missing = [program for program in ("sbatch", "squeue", "scontrol", "srun") if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"--slurm: {', '.join(missing)} not found; run it where the cluster's jobs are submitted, "
            "or leave --slurm out to train here"
        )


@dataclass(frozen=True)
class _Queued:
    number: str
    state: str
    comment: str


def _queue() -> list[_Queued] | None:
    """The jobs of this user, those that have just ended too; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%k"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        notice("squeue does not answer; the jobs are looked for again")
        return None
    if told.returncode != 0:
        notice(f"squeue fails; the jobs are looked for again: {told.stderr.strip()}")
        return None
    return [_Queued(*line.split("|", 2)) for line in told.stdout.splitlines() if line.count("|") >= 2]


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """A sweep that is itself in a job would hand on what Slurm says of that one."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {key: value for key, value in os.environ.items() if key in KEPT or key.startswith("SBATCH_")}
    with clean_env():
        os.environ.update(kept)
        yield
