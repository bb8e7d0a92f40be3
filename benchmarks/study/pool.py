"""Processes that take run after run from a queue, each importing everything once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.study.plan import Task, read_done

PATIENCE = 30.0  # seconds for a run to save itself when time is over
LOOK = 0.5  # seconds between looks at the clock
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Job = Callable[[Task], None]  # trains a run; importable, because another process calls it
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """What became of the tasks. skipped: finished before. stopped: interrupted when time was over."""

    skipped: list[Task] = field(default_factory=list)
    done: list[Task] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[Task] = field(default_factory=list)
    left: list[Task] = field(default_factory=list)


def run_queue(
    tasks: Sequence[Task], job: Job, workers: int, logs: Path, until: float | None = None, began: float | None = None,
    tell: Tell = lambda line: print(line, file=sys.stderr, flush=True),
) -> Outcome:  # fmt: skip
    """Trains what is not finished, in order, in `workers` processes.

    until: seconds after `began` (`time.monotonic()`, now unless given). No run starts that would end later, as far as
    runs of its setting, or else the longest of any, tell; what is in flight then is asked to save itself, and continues
    at the next call.
    """
    began = time.monotonic() if began is None else began
    skipped = [task for task in tasks if task.finished()]
    outcome = Outcome(skipped=skipped, left=[task for task in tasks if task not in skipped])
    pool, known, started = list[_Worker](), Durations(tasks), 0
    total, first = len(tasks), time.monotonic()
    tell(f"{len(outcome.skipped)} of {total} runs are finished")
    try:
        while outcome.left or any(one.task for one in pool):
            passed = time.monotonic() - began
            if until is not None and passed >= until:
                break
            while len(pool) < min(workers, len(outcome.left) + sum(one.task is not None for one in pool)):
                pool.append(_Worker(job, logs, started))
                started += 1
            for one in [one for one in pool if one.ready and one.task is None]:
                if (task := _next(outcome.left, known, None if until is None else until - passed)) is not None:
                    outcome.left.remove(task)
                    one.give(task)
            if until is not None and not any(one.task for one in pool) and all(one.ready for one in pool):
                break  # none of those that are left would end in time
            for one in _heard(pool, LOOK):
                if (said := one.hear()) is None:
                    continue
                what, task, value = said
                name = f"{task.setting} seed {task.seed}"
                if what == "done":
                    outcome.done.append(task)
                    known.add(task, value)
                    told = f"{len(outcome.skipped) + len(outcome.done)} of {total}: {name} in {value:.0f} s"
                    tell(f"{told}; {_left(outcome, pool, time.monotonic() - first)}")
                else:
                    outcome.failed[name] = value
                    tell(f"{name} FAILED: {value}")
                if one.over:
                    pool.remove(one)
    finally:
        for task in _end(pool):
            (outcome.done if task.finished() else outcome.stopped).append(task)
    if outcome.stopped or outcome.left:
        tell(f"{len(outcome.stopped)} runs were interrupted and {len(outcome.left)} not started; repeat to continue")
    return outcome


class Durations:
    """How long runs took on this kind of device."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.seconds: dict[str, list[float]] = {}
        for task in tasks:
            told = read_done(task.run) if task.finished() else None
            if told is not None and told["device"] == task.device:
                self.add(task, told["seconds"])

    def add(self, task: Task, seconds: float) -> None:
        self.seconds.setdefault(task.setting, []).append(seconds)

    def expected(self, task: Task) -> float | None:
        """Of a run; None while nothing is known."""
        if task.setting in self.seconds:
            return max(self.seconds[task.setting])
        return max((max(one) for one in self.seconds.values()), default=None)


def _next(left: Sequence[Task], known: Durations, remaining: float | None) -> Task | None:
    """The first task that is expected to end in time; one of which nothing is known may start."""
    for task in left:
        if remaining is None or (known.expected(task) or 0) <= remaining:
            return task
    return None


def _left(outcome: Outcome, pool: Sequence[_Worker], seconds: float) -> str:
    rest = len(outcome.left) + sum(one.task is not None for one in pool)
    return f"{rest} to go, about {seconds / len(outcome.done) * rest / 60:.0f} min" if rest else "all done"


class _Worker:
    """A process. ready: whether it can be given a task. task: what it works on. over: whether it has ended."""

    def __init__(self, job: Job, logs: Path, number: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        context = get_context("spawn")  # a forked process cannot use the GPU
        self.connection, theirs = context.Pipe()
        self.log, self.task, self.ready, self.over = logs / f"worker-{number}.txt", None, False, False
        self.process = context.Process(target=_work, args=(theirs, job, self.log), daemon=True)
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
        try:
            self.process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    task: Task | None
    connection: Connection

    def give(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def hear(self) -> tuple[str, Task, Any] | None:
        """What it says of its task: "done" and the seconds, or "failed" and why. None where it only is ready."""
        task, self.task = self.task, None
        try:
            what, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.over = True
            if task is None:
                raise RuntimeError(f"a process ended before it began; see {self.log}") from None
            return "failed", task, f"its process ended with status {self.process.exitcode}; see {self.log}"
        self.ready = True
        return None if task is None else (what, task, value)


def _heard(pool: Sequence[_Worker], timeout: float) -> list[_Worker]:
    by_connection: Mapping[Any, _Worker] = {one.connection: one for one in pool}
    return [by_connection[connection] for connection in wait(list(by_connection), timeout)]


def _end(pool: Sequence[_Worker]) -> list[Task]:
    """Ends all processes, those in the middle of a run once they have saved it. Returns what they worked on."""
    for one in pool:
        one.process.terminate()
    end = time.monotonic() + PATIENCE
    for one in pool:
        one.process.join(max(0.1, end - time.monotonic()))
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
    return [one.task for one in pool if one.task is not None]


def _work(connection: Connection, job: Job, log: Path) -> None:
    """What a process does until it is ended."""
    import traceback

    with log.open("ab") as file:  # everything that libraries print
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from draftplus.errors import Interrupted, UserError

    prepare: Callable[[], None] | None = getattr(job, "prepare", None)
    if prepare is not None:
        prepare()
    connection.send(("ready", None))
    while True:
        task: Task = connection.recv()
        print(f"--- {task.run}", flush=True)
        start = time.monotonic()
        try:
            job(task)
            task.finish(time.monotonic() - start)
        except Interrupted:
            return
        except UserError as error:
            connection.send(("failed", str(error)))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}; see {log}"))
        else:
            connection.send(("done", time.monotonic() - start))
