"""Trains the runs of a sweep, each in a process of its own, so that one that dies takes no other with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from draftplus.errors import Interrupted, UserError
from draftplus.progress import Advance, progress
from draftplus.runs.directory import locked
from draftplus.sweeps.manifest import Entry, Manifest, read_manifest
from draftplus.sweeps.plan import Plan, PlannedRun, identity
from draftplus.sweeps.runner import LOGS, Ending, Runner
from draftplus.training.interrupt import Interruption, interruption

MOST_NAMED = 3  # of the runs under way, in the line that shows the progress


def run_sweep(plan: Plan, runner: Runner) -> Manifest:
    """Trains what is not finished, and returns what became of each run. Runs of an earlier, smaller grid stay.

    Raises UserError where the directory is another recipe's sweep or cannot be written, or the runner cannot start a
    run; and Interrupted, once the runner has left them, where the process is asked to stop.
    """
    with locked(plan.directory):
        manifest = _continued(plan)
        manifest.save(plan.directory)
        waiting = [run for run in plan.runs if _entry(manifest, run).status != "finished"]
        try:
            if waiting:
                _train(plan, manifest, waiting, runner)
        except Interrupted:
            done = sum(1 for _ in manifest.with_status("finished"))
            told = f"stopped with {done} of {len(manifest.runs)} runs finished; {runner.farewell()}"
            print(f"{told}: {plan.directory}", file=sys.stderr)
            raise
    return manifest


def _continued(plan: Plan) -> Manifest:
    before = read_manifest(plan.directory)
    if before is not None and before.recipe != plan.recipe:
        raise UserError(f"{plan.directory} is a sweep of {before.recipe}, not of {plan.recipe}; give another name")
    known = {entry.name: entry for entry in before.runs} if before else {}
    entries = []
    for run in plan.runs:
        entry = known.pop(run.name, None) or Entry(run.name, run.settings)
        same = entry.settings == run.settings or identity(plan.recipe, entry.settings) == identity(
            plan.recipe, run.settings
        )
        done = same and (plan.directory / run.name / "adapter").is_dir()
        status = entry.status if entry.status == "finished" and done else "pending"
        entries.append(Entry(run.name, run.settings, status, None, entry.seconds))
    return Manifest(plan.recipe, plan.grid, [*entries, *known.values()])


def _entry(manifest: Manifest, run: PlannedRun) -> Entry:
    return next(entry for entry in manifest.runs if entry.name == run.name)


def _train(plan: Plan, manifest: Manifest, waiting: list[PlannedRun], runner: Runner) -> None:
    (plan.directory / LOGS).mkdir(exist_ok=True)
    active, total = list[PlannedRun](), sum(run.steps for run in plan.runs)
    with (
        interruption() as interrupt,
        progress("sweep", total, unit="steps") as advance,
        _left(plan, manifest, active, runner),
    ):
        while waiting or active:
            while waiting and not interrupt.asked and runner.start(waiting[0]):
                active.append(waiting.pop(0))
                entry = _entry(manifest, active[-1])
                entry.status, entry.error = "running", None
                manifest.save(plan.directory)
            _pause(runner.between_looks, interrupt)
            for run, ending in runner.ended():
                active.remove(run)
                _finish(plan, manifest, run, ending, "failed")
                _show(plan, manifest, active, advance.event)
            _show(plan, manifest, active, advance)


def _pause(seconds: float, interrupt: Interruption) -> None:
    end = time.monotonic() + seconds
    while not interrupt.asked and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
    if interrupt.asked:
        raise Interrupted


def _finish(plan: Plan, manifest: Manifest, run: PlannedRun, ending: Ending, otherwise: str) -> None:
    """Notes how a run ended: finished where its runner says so, and `otherwise` where not."""
    entry = _entry(manifest, run)
    entry.seconds = round(entry.seconds + ending.seconds, 1)
    entry.status = otherwise if ending.error is not None else "finished"
    entry.error = ending.error if entry.status == "failed" else None
    manifest.save(plan.directory)


@contextmanager
def _left(plan: Plan, manifest: Manifest, active: list[PlannedRun], runner: Runner) -> Iterator[None]:
    """However the block is left, the runner leaves its runs in its own way."""
    try:
        yield
    finally:
        for run, ending in runner.leave():
            active.remove(run)
            _finish(plan, manifest, run, ending, "interrupted")


def _show(plan: Plan, manifest: Manifest, active: Sequence[PlannedRun], advance: Advance) -> None:
    under_way = {run.name for run in active}
    over = {entry.name for entry in manifest.with_status("finished", "failed")}  # a failed one has no steps left either
    done = sum(run.steps for run in plan.runs if run.name in over)
    done += sum(_steps(plan.directory / name) for name in under_way)
    over_count = sum(run.name in over for run in plan.runs)
    few = ", ".join(sorted(under_way)) if len(under_way) <= MOST_NAMED else f"{len(under_way)} under way"
    names = f": {few}" if under_way else ""
    advance(done, f"run {min(over_count + 1, len(plan.runs))} of {len(plan.runs)}{names}")


def _steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
