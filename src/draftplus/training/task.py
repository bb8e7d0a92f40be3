"""What the driver trains: a diffusion model, or anything else with steps and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from draftplus.progress import Advance
from draftplus.runs.journal import Row
from draftplus.training.optim import Parameters
from draftplus.training.state import State

Abandonable = Callable[[], AbstractContextManager[object]]  # around work that a stop may throw away


class Task(Protocol):
    """Every process calls each method but `write_best`, in the same order; rows of numbers are the same on all."""

    @property
    def parameters(self) -> Parameters:
        """What the optimizer updates, by a stable name."""
        ...

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        ...

    def step(self, state: State, abandonable: Abandonable) -> dict[str, float]:
        """One optimizer step from `state`. Returns its means, `loss` and `grad_norm` among them."""
        ...

    def note(self, row: Row) -> str:
        """What the progress bar says of a step."""
        ...

    def evaluate(self, step: int, advance: Advance) -> Row:
        """Measures the weights as they are. Returns the row of eval.jsonl; its files lie in the run by then."""
        ...

    def comparable(self, rows: Sequence[Row]) -> list[Row]:
        """Those of the run's earlier evaluations that compare with the ones to come.

        Raises UserError where the run cannot go on without one that does not.
        """
        ...

    def stop_reason(self, rows: Sequence[Row]) -> str | None:
        """Why the run ends after its latest evaluation, or None."""
        ...

    def write_best(self, rows: Sequence[Row]) -> None:
        """Writes best.json: which of the evaluated steps is the best so far, and by which rule. On the main process."""
        ...

    def save(self, directory: Path | None) -> None:
        """Writes the trained weights as they are; None on a process that only takes part in gathering them."""
        ...

    def before(self, evaluated: Sequence[int], step: int) -> None:
        """Refuses what could not be finished, before any step is taken. evaluated: the steps in eval.jsonl.

        Raises UserError.
        """
        ...

    def finish(self, step: int, advance: Advance) -> None:
        """What is done once, after the last evaluation."""
        ...
