"""What trains the runs of a sweep: processes of this machine, or jobs of a cluster. They have this in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a job waits for its nodes' processes without torch
    from draftplus.sweeps.plan import Plan, PlannedRun

LOGS = "logs"
TORCHRUN = "torch/distributed/elastic/"  # in each line of its log


@dataclass(frozen=True)
class Ending:
    """How an attempt at a run ended. error: why it failed, if it did. seconds: how long it took."""

    error: str | None
    seconds: float


class Runner(Protocol):
    """Trains runs, several at the same time, and says which of them have ended."""

    @property
    def between_looks(self) -> float:
        """Seconds."""

    def start(self, run: PlannedRun) -> bool:
        """Starts a run, or takes up one that still trains from an earlier sweep; False where there is no room yet.

        Raises UserError where it cannot be started.
        """

    def ended(self) -> list[tuple[PlannedRun, Ending]]:
        """The runs that have ended since the last look."""

    def leave(self) -> list[tuple[PlannedRun, Ending]]:
        """The sweep is being stopped. The runs that have ended; others go on without it."""

    def farewell(self) -> str:
        """What a user who stopped the sweep should know."""


def log_path(directory: Path, name: str) -> Path:
    """What a run printed."""
    return directory / LOGS / f"{name}.txt"


def ending(plan: Plan, run: PlannedRun, code: int, seconds: float) -> Ending:
    """Of a process that left with this status, or by the signal -`code`. Without a result a run is not finished."""
    log = log_path(plan.directory, run.name)
    if code == 0 and (plan.directory / run.name / "adapter").is_dir():
        return Ending(None, seconds)
    return Ending(said(log, code) if code else f"it ended without a result; see {log}", seconds)


def said(log: Path, code: int) -> str:
    """The last line that a failed run printed, or the signal that ended it."""
    if code < 0:
        return f"killed by signal {-code}" + (", perhaps for lack of memory" if code == -9 else "") + f"; see {log}"
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if TORCHRUN in line and "failed (exitcode" in line:  # what follows is torchrun's own
            lines = lines[:i]
            break
    lines = [line for line in lines if TORCHRUN not in line]
    return lines[-1].removeprefix("draftplus: ") if lines else f"exit status {code} without any output"
