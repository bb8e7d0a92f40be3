"""A process that makes itself ready while a sweep is planned, and then trains its first run.

Most of the time until a run takes its first step goes to the import of libraries, which planning needs none of. On a
machine with a second core, both go on at the same time. What becomes of the process is `draftplus train` like any
other, started a little early; where there is no run for it to train, it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

COMMAND = (sys.executable, "-P", "-m", "draftplus.cli.ahead")

Told = Mapping[str, str]  # the variables of an environment


@contextmanager
def ready_ahead(environment: Told) -> Iterator[Ahead]:
    """Inside, there is such a process, in this environment; where there is a second core for it."""
    alone = len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) < 2
    ahead = Ahead(None if alone else environment)
    try:
        yield ahead
    finally:
        ahead.dismiss()


class Ahead:
    """The process, until it is given its run. environment: None for no process."""

    def __init__(self, environment: Told | None) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        if environment is not None:
            quiet = subprocess.DEVNULL  # if it fails, the run is started in the usual way and says why
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=dict(environment)
            )

    def train(self, arguments: Sequence[str], environment: Told, log: Path) -> subprocess.Popen[bytes] | None:
        """The process, which now runs `draftplus` with these arguments and prints to `log`; None where there is none
        that waits, or its environment is another."""
        if self._process is None or environment != self._environment or self._process.poll() is not None:
            self.dismiss()
            return None
        process, self._process = self._process, None
        assert process.stdin is not None
        log.write_bytes(b"")
        try:
            with process.stdin as told:
                told.write(json.dumps({"arguments": [*arguments], "log": str(log.resolve())}).encode())
        except BrokenPipeError:  # it has just died
            process.wait()
            return None
        return process

    def dismiss(self) -> None:
        """Ends the process where it still waits."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
