"""Progress on stderr with the time that is left: a bar where it is a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from draftplus.errors import printable

Advance = Callable[[int, str], None]  # (units done so far, what to say)

QUIET = 2.0  # seconds in which a job may end without a word
FIRST = 10.0  # seconds until the first line that nothing but time has called for
APART = 60.0  # seconds from one such line to the next


@dataclass
class Pulse:
    """How often this process has shown that it gets on, and what at. Processes that wait for it look at this."""

    beats: int = 0
    doing: str = "starting"


PULSE = Pulse()


def beat(doing: str | None = None) -> None:
    """A sign of progress. To be given where work goes on, and never by waiting."""
    PULSE.beats += 1
    PULSE.doing = doing or PULSE.doing


@dataclass(frozen=True)
class Progress:
    """What a job calls as it goes: `advance(done, note)`, or `advance.event(done, note)` for what deserves a line."""

    show: Callable[[int, str, bool], None]
    title: str = ""
    unit: str = ""

    def __call__(self, done: int, note: str) -> None:
        self._show(done, note, False)

    def event(self, done: int, note: str) -> None:
        self._show(done, note, True)

    def _show(self, done: int, note: str, event: bool) -> None:
        beat(", ".join(filter(None, [self.title, f"{done} {self.unit}".rstrip() + " done", note.partition(", ")[0]])))
        self.show(done, note, event)


@contextmanager
def progress(title: str, total: int | None, show: bool = True, unit: str = "") -> Iterator[Progress]:
    """Shows a job of `total` units; None where their number is not known, and only the time can be told.

    Calls made of what it yields say how many units are done, with a note. Without a terminal there is a line at each
    event and one a minute, also while no call is made, and nothing at all for a job of less than two seconds.
    """
    beat(title)
    if not show:
        yield Progress(lambda done, note, event: None, title, unit)
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as told:
            yield told
    else:
        with _lines(title, total, unit) as told:
            yield told


@contextmanager
def _bar(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    counted = (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (
        TextColumn("{task.description}"), BarColumn(), *(counted if total is not None else (TimeElapsedColumn(),)),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    # a step may take longer than the 30 s over which rich would measure the speed; what is not counted leaves no bar
    with Bar(*columns, console=Console(stderr=True), transient=total is None, speed_estimate_period=1800) as bar:
        task = bar.add_task(title, total=total, note="")
        yield Progress(lambda done, note, event: bar.update(task, completed=done, note=printable(note)), title, unit)


@contextmanager
def _lines(title: str, total: int | None, unit: str) -> Iterator[Progress]:
    lines, over = Lines(title, total, unit, _write, time.monotonic), threading.Event()

    def watch() -> None:  # a step, or loading a model, may take minutes in which nobody calls
        while not over.wait(1.0):
            lines.look()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield Progress(lines.show, title, unit)
        lines.end()
    finally:
        over.set()
        watching.join()


def _write(line: str) -> None:
    with suppress(OSError, ValueError):  # who read it has gone; a job does not end for that
        print(printable(line), file=sys.stderr, flush=True)


@dataclass
class Lines:
    """When a plain line is due, and what it says. clock: seconds, from any start."""

    title: str
    total: int | None
    unit: str
    write: Callable[[str], None]
    clock: Callable[[], float]
    note: str = ""
    done: int | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)  # a signal's handler may show something too

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.last: float | None = None  # when a line was written
        self.first, self.counted_from = 0, self.began  # units that were done before, and when the next was begun

    def show(self, done: int, note: str, event: bool = False) -> None:
        """Takes note of how far the job is, and writes it where a line is due, or for an event in any case."""
        with self.lock:
            if self.done is None or done <= self.first:
                self.first, self.counted_from = done, self.clock()
            self.done, self.note = done, note
            if event and self.clock() - self.began >= QUIET:
                self._line()
            else:
                self.look()

    def look(self) -> None:
        """Writes a line where one is due."""
        with self.lock:
            since = self.clock() - (self.began if self.last is None else self.last)
            if since >= (FIRST if self.last is None and self._counts() else APART):
                self._line()

    def end(self) -> None:
        """Writes how long it took, where anything was written before."""
        with self.lock:
            if self.last is not None:
                self.write(f"{self.title}: done in {duration(self.clock() - self.began)}")

    def _line(self) -> None:
        self.last = self.clock()
        told = [f"{self.done} of {self.total}{f' {self.unit}' * bool(self.unit)}"] if self._counts() else []
        told += [self.note] if self.note else []
        told.append(self._left() or f"{duration(self.last - self.began)} so far")
        self.write(f"{self.title}: {', '.join(told)}")

    def _counts(self) -> bool:
        return bool(self.total) and self.done is not None

    def _left(self) -> str | None:
        """The time that is left, at the speed of the units so far; None where none is done, or all are."""
        if not self._counts() or self.done is None or self.total is None or not self.first < self.done < self.total:
            return None
        each = (self.clock() - self.counted_from) / (self.done - self.first)
        return f"{duration((self.total - self.done) * each)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
