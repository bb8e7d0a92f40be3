"""Runs as processes of this machine, as many at the same time as it has GPUs, or as asked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.errors import UserError
from draftplus.launcher import SWEEP
from draftplus.runs.directory import is_held
from draftplus.sweeps.ahead import Ahead
from draftplus.sweeps.plan import Plan, PlannedRun
from draftplus.sweeps.runner import Ending, ending, log_path

ARGUMENTS = ("train", "--trust")  # planning has asked
COMMAND = (sys.executable, "-P", "-m", "draftplus", *ARGUMENTS)  # -P: not the modules of the working directory
BETWEEN_LOOKS = 0.5  # seconds
PATIENCE = 120.0  # seconds for a run to save itself when the sweep is stopped

Slot = dict[str, str]  # variables of a run's environment


@dataclass
class _Attempt:
    """A run in flight. slot: what it has of the machine.

    process: None while a process of an earlier sweep, whose end was sudden, still trains it.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes] | None
    slot: Slot
    began: float


class LocalRunner:
    """jobs: how many train at the same time; None means one on each GPU, or one. ahead: the process of the first run
    that is started, if it waits already.

    Raises UserError where `jobs` is below 1.
    """

    def __init__(self, plan: Plan, jobs: int | None, ahead: Ahead | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise UserError(f"jobs is {jobs}; give at least 1")
        self._plan, self._jobs, self._ahead = plan, jobs, ahead
        self._free: list[Slot] | None = None
        self._active: list[_Attempt] = []

    @property
    def between_looks(self) -> float:
        return BETWEEN_LOOKS

    def start(self, run: PlannedRun) -> bool:
        """One that another process still trains is waited for, and then taken up where that left it."""
        if self._free is None:
            self._free = slots([one.config.device for one in self._plan.runs], self._jobs)
        if not self._free:
            return False
        held, slot = is_held(self._plan.directory / run.name), self._free.pop(0)
        if held:
            print(f"{run.name}: another process is still training it; waiting for it to end", file=sys.stderr)
        process = None if held else self._process(run, slot)
        self._active.append(_Attempt(run, process, slot, time.monotonic()))
        return True

    def ended(self) -> list[tuple[PlannedRun, Ending]]:
        for attempt in [one for one in self._active if one.process is None]:
            if not is_held(self._plan.directory / attempt.run.name):
                attempt.process = self._process(attempt.run, attempt.slot)
        over = [one for one in self._active if one.process is not None and one.process.poll() is not None]
        for attempt in over:
            self._active.remove(attempt)
            assert self._free is not None
            self._free.append(attempt.slot)
        return [(attempt.run, self._ending(attempt)) for attempt in over]

    def leave(self) -> list[tuple[PlannedRun, Ending]]:
        """No run stays behind: each is asked to stop, and waited for while it saves itself."""
        started = [attempt.process for attempt in self._active if attempt.process is not None]
        for process in started:
            process.terminate()
        end = time.monotonic() + PATIENCE
        for process in started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        over, self._active = self._active, []
        return [(attempt.run, self._ending(attempt)) for attempt in over]

    def farewell(self) -> str:
        return "repeat the command to continue"

    def _process(self, run: PlannedRun, slot: Slot) -> subprocess.Popen[bytes]:
        ahead, self._ahead = self._ahead, None
        log, told = log_path(self._plan.directory, run.name), [*ARGUMENTS, *self._plan.arguments(run)]
        waiting = ahead.train(told, environment(slot), log) if ahead is not None else None
        return waiting or _process(self._plan, run, slot)

    def _ending(self, attempt: _Attempt) -> Ending:
        code = attempt.process.returncode if attempt.process is not None else 1
        return ending(self._plan, attempt.run, code, time.monotonic() - attempt.began)


def slots(wanted: Sequence[str], jobs: int | None) -> list[Slot]:
    """The part of the machine that each of the runs has that train at the same time: a GPU, or some of the cores."""
    devices = _devices(wanted)
    count = jobs or max(1, len(devices))
    own: Slot = {}
    if count > max(1, len(devices)) and "OMP_NUM_THREADS" not in os.environ:
        own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return [{**own, "CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else dict(own) for i in range(count)]


def _devices(wanted: Sequence[str]) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them, where there are several and no run asks for a certain one."""
    if not set(wanted) <= {"auto", "cuda"}:
        return []
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def environment(slot: Slot) -> dict[str, str]:
    """That of a run."""
    # what torchrun says is about this process, not about one that it starts
    told = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return told | {"PYTHONUNBUFFERED": "1", SWEEP: str(os.getpid()), **slot}


def _process(plan: Plan, run: PlannedRun, slot: Slot) -> subprocess.Popen[bytes]:
    with log_path(plan.directory, run.name).open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, *plan.arguments(run)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(slot),
        )  # fmt: skip
