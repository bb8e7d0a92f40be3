"""What `--slurm` says of a run's job: a few keys that draftplus understands, and any other option of sbatch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from draftplus.errors import UserError

NEXT = re.compile(r",(?=\s*[a-z][a-z_-]*=)")  # any other comma belongs to the value, as in partition=a,b
TIMES = re.compile(r"\d+|(\d+-)?\d+(:\d+){0,2}")  # minutes, minutes:seconds, hours:minutes:seconds, days-hours, ...
GPUS = re.compile(r"([A-Za-z][\w.-]*:)?(\d+)")
GRES = re.compile(r"gpu:([A-Za-z][\w.-]*:)?(\d+)")  # how some clusters want the same to be said
OURS = {
    "array": "each run is one job", "chdir": "runs train in the directory from which the sweep is started",
    "comment": "it tells the jobs of a run apart", "error": "a run's output goes to the sweep's logs/",
    "gpus-per-node": "write gpus=N, of each node", "job-name": "a job has the name of its run",
    "no-requeue": "a job that is preempted is queued again", "ntasks": "write nodes=N and gpus=N",
    "ntasks-per-node": "write nodes=N and gpus=N", "open-mode": "a job that is queued again appends to its output",
    "output": "a run's output goes to the sweep's logs/", "requeue": "a job that is preempted is queued again",
    "signal": "write grace=SECONDS", "wrap": "the job trains a run",
}  # fmt: skip


@dataclass(frozen=True)
class SlurmOptions:
    """nodes: of each run. processes: of each node, one for each GPU. grace: seconds before the time limit at which a
    run is asked to save itself. sbatch: all other options by their long names; True: one without a value.
    """

    nodes: int
    processes: int
    grace: int
    sbatch: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        """As they are given to sbatch."""
        named = {"nodes": self.nodes, **self.sbatch}
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in named.items()]


def read_options(text: str) -> SlurmOptions:
    """Of `KEY=VALUE,...`, such as partition=gpu,time=2:00:00,gpus=1. An empty text leaves all to the cluster.

    Raises UserError for a key without a value, one that is given twice or that the sweep sets itself, and a value that
    draftplus has to understand and does not.
    """
    given: dict[str, str] = {}
    for piece in NEXT.split(text) if text.strip() else ():
        key, equals, value = (part.strip() for part in piece.partition("="))
        key = key.replace("_", "-")
        if not equals or not value or not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(
                f"--slurm '{text}': '{piece}' is not KEY=VALUE; for example: --slurm partition=gpu,time=2:00:00,gpus=1"
            )
        if key in OURS:
            raise UserError(f"--slurm {key}={value}: the sweep sets {key} itself; {OURS[key]}")
        if key in given:
            raise UserError(f"--slurm '{text}': {key} is given twice; give one value")
        given[key] = value
    nodes = _whole("nodes", given.pop("nodes", "1"))
    grace = _whole("grace", given.pop("grace", "120"))
    processes = 1
    if "gpus" in given:
        kind = GPUS.fullmatch(given["gpus"])
        if kind is None or int(kind[2]) < 1:
            raise UserError(
                f"--slurm gpus={given['gpus']}: give the number of GPUs of each node, such as gpus=2 or gpus=a100:2; "
                "leave it out for a CPU"
            )
        processes = int(kind[2])
    elif (kind := GRES.fullmatch(given.get("gres", ""))) is not None:
        processes = max(1, int(kind[2]))
    if "time" in given and not TIMES.fullmatch(given["time"]):
        raise UserError(
            f"--slurm time={given['time']}: give minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as time=2:00:00"
        )
    names = {"gpus": "gpus-per-node", "cpus": "cpus-per-task"}
    sbatch = {names.get(key, key): True if value == "true" else value for key, value in given.items()}
    return SlurmOptions(nodes, processes, grace, sbatch)


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"--slurm {key}={value}: give a whole number of 1 or more")
    return int(value)
