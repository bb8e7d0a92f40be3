"""Trains the runs of a sweep, each in a process of its own, so that one that dies takes no other with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from draftplus.errors import Interrupted, UserError
from draftplus.launcher import SWEEP
from draftplus.progress import Advance, progress
from draftplus.runs.directory import is_held, locked
from draftplus.sweeps.manifest import Entry, Manifest, read_manifest
from draftplus.sweeps.plan import Plan, PlannedRun, identity
from draftplus.training.interrupt import interruption

# -P: not the modules of the working directory; --trust: planning has asked
COMMAND = (sys.executable, "-P", "-m", "draftplus", "train", "--trust")
LOGS = "logs"
BETWEEN_LOOKS = 0.5  # seconds
PATIENCE = 120.0  # seconds for a run to save itself when the sweep is stopped

Slot = dict[str, str]  # variables of a run's environment


def run_sweep(plan: Plan, jobs: int | None = None) -> Manifest:
    """Trains what is not finished, and returns what became of each run. Runs of an earlier, smaller grid stay.

    jobs: how many train at the same time; null means one on each GPU, or one.

    Raises UserError where `jobs` is below 1, or the directory is another recipe's sweep or cannot be written; and
    Interrupted, once every run in flight has saved itself, where the process is asked to stop.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs is {jobs}; give at least 1")
    with locked(plan.directory):
        manifest = _continued(plan)
        manifest.save(plan.directory)
        waiting = [run for run in plan.runs if _entry(manifest, run).status != "finished"]
        try:
            if waiting:
                _train(plan, manifest, waiting, jobs)
        except Interrupted:
            done = sum(1 for _ in manifest.with_status("finished"))
            told = f"stopped with {done} of {len(manifest.runs)} runs finished; repeat the command to continue"
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


@dataclass
class _Attempt:
    """A run in flight. slot: what it has of the machine.

    process: None while a process of an earlier sweep, whose end was sudden, still trains it.
    """

    run: PlannedRun
    entry: Entry
    process: subprocess.Popen[bytes] | None
    slot: Slot
    began: float
    before: float


def _train(plan: Plan, manifest: Manifest, waiting: list[PlannedRun], jobs: int | None) -> None:
    (plan.directory / LOGS).mkdir(exist_ok=True)
    free, active = slots([run.config.device for run in waiting], jobs), list[_Attempt]()
    total = sum(run.steps for run in plan.runs)
    with interruption() as interrupt, progress("sweep", total, unit="steps") as advance, _ended(active, plan, manifest):
        while waiting or active:
            if interrupt.asked:
                raise Interrupted
            while free and waiting:
                active.append(_start(plan, manifest, waiting.pop(0), free.pop(0)))
            time.sleep(BETWEEN_LOOKS)
            for attempt in [one for one in active if one.process is None]:
                if not is_held(plan.directory / attempt.run.name):
                    attempt.process = _process(plan, attempt.run, attempt.slot)
            for attempt in [one for one in active if one.process is not None and one.process.poll() is not None]:
                active.remove(attempt)
                free.append(attempt.slot)
                _finish(plan, manifest, attempt, "failed")
                _show(plan, manifest, active, advance.event)
            _show(plan, manifest, active, advance)


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
    count = torch.cuda.device_count() if set(wanted) <= {"auto", "cuda"} else 0
    if count < 2:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _start(plan: Plan, manifest: Manifest, run: PlannedRun, slot: Slot) -> _Attempt:
    """Starts a run; one that another process still trains is waited for, and then taken up where that left it."""
    entry, held = _entry(manifest, run), is_held(plan.directory / run.name)
    if held:
        print(f"{run.name}: another process is still training it; waiting for it to end", file=sys.stderr)
    process = None if held else _process(plan, run, slot)
    attempt = _Attempt(run, entry, process, slot, time.monotonic(), entry.seconds)
    entry.status, entry.error = "running", None
    manifest.save(plan.directory)
    return attempt


def _process(plan: Plan, run: PlannedRun, slot: Slot) -> subprocess.Popen[bytes]:
    # what torchrun says is about this process, not about one that it starts
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONUNBUFFERED": "1", SWEEP: str(os.getpid()), **slot}
    with log_path(plan.directory, run.name).open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, *plan.arguments(run)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def _finish(plan: Plan, manifest: Manifest, attempt: _Attempt, otherwise: str) -> None:
    """Notes how a run ended: finished where it says so itself and its result is there, and `otherwise` where not."""
    code, entry = attempt.process.returncode if attempt.process is not None else 1, attempt.entry
    entry.seconds = round(attempt.before + time.monotonic() - attempt.began, 1)
    result = (plan.directory / attempt.run.name / "adapter").is_dir()
    entry.status = "finished" if code == 0 and result else otherwise
    if entry.status == "failed":
        log = log_path(plan.directory, attempt.run.name)
        entry.error = _said(log, code) if code else f"it ended without a result; see {log}"
    manifest.save(plan.directory)


def _said(log: Path, code: int) -> str:
    """The last line that a failed run printed, or the signal that ended it."""
    if code < 0:
        return f"killed by signal {-code}" + (", perhaps for lack of memory" if code == -9 else "") + f"; see {log}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("draftplus: ") if lines else f"exit status {code} without any output"


def log_path(directory: Path, name: str) -> Path:
    """What a run printed."""
    return directory / LOGS / f"{name}.txt"


@contextmanager
def _ended(active: list[_Attempt], plan: Plan, manifest: Manifest) -> Iterator[None]:
    """However the block is left, no run stays behind: each is asked to stop, and waited for while it saves itself."""
    try:
        yield
    finally:
        started = [(attempt, attempt.process) for attempt in active if attempt.process is not None]
        for _, process in started:
            process.terminate()
        end = time.monotonic() + PATIENCE
        for _, process in started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for attempt in active:
            _finish(plan, manifest, attempt, "interrupted")


def _show(plan: Plan, manifest: Manifest, active: Sequence[_Attempt], advance: Advance) -> None:
    under_way = {attempt.run.name for attempt in active}
    over = {entry.name for entry in manifest.with_status("finished", "failed")}  # a failed one has no steps left either
    done = sum(run.steps for run in plan.runs if run.name in over)
    done += sum(_steps(plan.directory / name) for name in under_way)
    over_count = sum(run.name in over for run in plan.runs)
    names = f": {', '.join(sorted(under_way))}" if under_way else ""
    advance(done, f"run {min(over_count + 1, len(plan.runs))} of {len(plan.runs)}{names}")


def _steps(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
