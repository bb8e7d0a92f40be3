"""Progress on stderr where it is a terminal, with the time that is left; nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from draftplus.errors import printable

Advance = Callable[[int, str], None]  # (units done so far, what to say)


@contextmanager
def progress(title: str, total: int, show: bool = True) -> Iterator[Advance]:
    """A bar of `total` units. Calls made of what it yields move it and replace its note."""
    if not (show and sys.stderr.isatty()):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    # a step may take longer than the 30 s over which rich would measure the speed
    with Progress(*columns, console=Console(stderr=True), transient=False, speed_estimate_period=1800) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(done: int, note: str) -> None:
            bar.update(task, completed=done, note=printable(note))

        yield advance


def _silent(done: int, note: str) -> None:
    pass
