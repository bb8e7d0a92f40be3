"""What the workers of a study do in tests: importable by another process, and light."""

from __future__ import annotations

import os
import time

from benchmarks.study.plan import Task


def leave_a_mark(task: Task) -> None:
    """Notes each time that it is called, and fails where the task asks for it."""
    task.run.mkdir(parents=True, exist_ok=True)
    with (task.run / "mark").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if task.keys.get("do") == "raise":
        raise ValueError("not this one")
    if task.keys.get("do") == "die":
        os._exit(7)


def take_long(task: Task) -> None:
    """Takes ten seconds the first time, and no time where it was begun before."""
    task.run.mkdir(parents=True, exist_ok=True)
    began = (task.run / "began").exists()
    (task.run / "began").touch()
    if not began:
        time.sleep(10)
