"""torchrun, with processes that are killed while they train."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.processes import ROOT


class Torchrun:
    """`torchrun OPTIONS -m draftplus ARGUMENTS` in a directory, as a group of processes of its own."""

    def __init__(
        self, options: Sequence[str], arguments: Sequence[str], directory: Path, before: Sequence[str] = (),
        name: str = "said.txt", **environment: str,
    ) -> None:  # fmt: skip
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / name
        with self.log.open("w") as said:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "torch.distributed.run", *options, "-m", "draftplus", *arguments],
                cwd=directory, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def ranks(self) -> dict[int, int]:
        """The processes that train now, by rank."""
        found = {}
        for child in children(self.process.pid):
            with suppress(OSError):  # it ends meanwhile
                told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                known = dict(entry.decode().split("=", 1) for entry in told if b"=" in entry)
                if "RANK" in known:
                    found[int(known["RANK"])] = child
        return found

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"nothing happened:\n{self.log.read_text()}"
            time.sleep(0.01)

    def wait(self, seconds: float = 280) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()}") from None

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing behind."""
        for process in [self.process.pid, *children(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def children(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def kill_at_random(torchrun: Torchrun, run: Path, steps: int, draw: random.Random, seen: set[int]) -> str | None:
    """Kills a rank that was not there before, some time after it was started, or after as many steps as are drawn.

    Returns what was done; None where all had ended by then. seen: the processes of earlier attempts.
    """
    torchrun.until(lambda: len(now := torchrun.ranks()) == 2 and not seen & set(now.values()))
    now, rank, late = torchrun.ranks(), draw.randrange(2), draw.random()
    seen |= set(now.values())
    if draw.random() < 0.3:
        when = f"{10 * late:.2f} s after its start"
        time.sleep(10 * late)
    else:
        target = draw.randint(min(count(run), steps * 4 // 5), steps * 4 // 5)
        when = f"{late / 2:.2f} s after step {target}"
        torchrun.until(lambda: count(run) >= target)
        time.sleep(late / 2)
    done = count(run)
    try:
        os.kill(now[rank], signal.SIGKILL)
    except ProcessLookupError:
        return None
    return f"rank {rank} killed {when}, with {done} steps done"


def count(run: Path) -> int:
    """The steps whose numbers are written."""
    with suppress(OSError):
        return len((run / "metrics.jsonl").read_bytes().splitlines())
    return 0
