"""What a Slurm job does on its nodes: trains one run, and queues again when it is preempted or out of time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from draftplus.launcher import SWEEP
from draftplus.sweeps.runner import log_path

JOBS = "slurm"  # directory in the sweep: submitit's files, and a record of each run's job
WARNING = signal.SIGUSR1
TRAIN = ("-m", "draftplus", "train", "--trust")  # --trust: planning has asked
LIMIT_MARGIN = 60  # seconds; Slurm looks at time limits as seldom as that
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", SWEEP)  # what is said of the process that submitted the job
PORTS = range(20000, 30000)


@dataclass
class Record:
    """What a run's last job says of itself. code: how the training ended, as a process does; None: it has not, or did
    not live to say so. error: why the job does not go on, where the training did not end on its own.
    """

    job: str
    arguments: list[str]
    seconds: float = 0.0
    code: int | None = None
    error: str | None = None


def record_path(directory: Path, name: str) -> Path:
    return directory / JOBS / f"{name}.json"


def read_record(directory: Path, name: str) -> Record | None:
    """None where there is none, or a node is about to write it."""
    try:
        return Record(**json.loads(record_path(directory, name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Training:
    """One run's job, the same on each of its nodes. arguments: of `draftplus train`. grace: see SlurmOptions."""

    directory: Path
    name: str
    arguments: tuple[str, ...]
    nodes: int
    processes: int
    grace: int

    def __call__(self) -> None:
        """Trains until the run is finished, fails, or is asked to stop, by Slurm's warning or SIGTERM.

        Leaves with the status of the training, so that Slurm's own accounting tells a failed run, too.
        """
        node, job = int(os.environ.get("SLURM_NODEID", "0")), os.environ["SLURM_JOB_ID"]
        again = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        before, began = _newest(self.directory / self.name), time.monotonic()
        log = log_path(self.directory, self.name if node == 0 else f"{self.name}.node{node}")
        if node != 0:  # one of them speaks for all
            self._train(job, node, log, again)
            return
        former, record = read_record(self.directory, self.name), Record(job, list(self.arguments))
        if again and former is not None and former.job == job:
            record.seconds = former.seconds
        self._write(record)
        code, asked = self._train(job, node, log, again)
        record.seconds = round(record.seconds + time.monotonic() - began, 1)
        if not asked or code == 0:
            record.code = code
        self._write(record)
        if record.code is None:
            record.error = self._queue_again(job, stuck=_newest(self.directory / self.name) == before)
            if record.error is not None:
                self._write(record)
        if code != 0:
            sys.exit(code if code > 0 else 128 - code)

    def _train(self, job: str, node: int, log: Path, again: bool) -> tuple[int, bool]:
        """The status of the training, and whether it was asked to stop."""
        asked = False
        process: subprocess.Popen[bytes] | None = None

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            # Slurm's SIGTERM reaches all processes of a job; torchrun, told twice, would leave its own before they end
            if not asked and process is not None and (number == WARNING or not self._is_distributed):
                process.terminate()
            asked = True

        for number in (signal.SIGTERM, WARNING):
            signal.signal(number, stop)
        environment = {key: value for key, value in os.environ.items() if key not in FOREIGN}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(self.grace))  # its 30 seconds may not do to save
        with log.open("ab" if again else "wb") as out:
            process = subprocess.Popen(
                self.command(job, node), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=environment, preexec_fn=_deaf,
            )  # fmt: skip
        if asked:
            process.terminate()
        return process.wait(), asked

    def command(self, job: str, node: int) -> list[str]:
        """A process of its own, or torchrun's, where the run has several. They meet at the first node."""
        if not self._is_distributed:
            return [sys.executable, "-P", *TRAIN, *self.arguments]
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")  # where srun was called, the first node
        meeting = f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        port = PORTS[int(job) % len(PORTS)]
        return [
            sys.executable, "-P", "-m", "torch.distributed.run", f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.processes}", f"--rdzv-id={meeting}", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host}:{port}", f"--rdzv-conf=is_host={int(node == 0)}", *TRAIN, *self.arguments,
        ]  # fmt: skip

    @property
    def _is_distributed(self) -> bool:
        return self.nodes * self.processes > 1

    def _queue_again(self, job: str, stuck: bool) -> str | None:
        """Asks Slurm to start the job again, unless it does so itself or the job was cancelled. Returns why it cannot.

        stuck: nothing was saved. A time limit that leaves no time for a step would do so for ever.
        """
        told = _run("squeue", "--noheader", f"--jobs={job}", "--format=%T|%L")
        state, _, left = told.stdout.strip().partition("|")
        if told.returncode == 0 and state != "RUNNING":
            return None
        if stuck and (seconds := _seconds(left)) is not None and seconds <= self.grace + LIMIT_MARGIN:
            return "no step could be saved within the time limit of the job; give a longer one, --slurm time=..."
        asked = _run("scontrol", "requeue", job)
        if asked.returncode == 0:
            return None
        return f"it is saved, but its job cannot be queued again: {(asked.stderr or asked.stdout).strip()}"

    def _write(self, record: Record) -> None:
        path = record_path(self.directory, self.name)
        whole = path.with_name(f".{path.name}")
        whole.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        whole.replace(path)


def _deaf() -> None:
    signal.signal(WARNING, signal.SIG_IGN)  # it reaches every process of a job, and would end one that is about to save


def _newest(run: Path) -> str | None:
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default=None)


def _run(*command: str) -> Any:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _seconds(left: str) -> int | None:
    """Of [DAYS-][HOURS:]MINUTES:SECONDS; None for UNLIMITED and the like."""
    known = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if known is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in known.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
