"""What processes of a test do that meet one another."""

from __future__ import annotations

import os
import signal
import time

from draftplus.distributed import world
from draftplus.distributed.meeting import KEPT
from draftplus.errors import UserError
from draftplus.progress import beat

PATIENCE = 0.05  # minutes


def busy_for_long() -> None:
    """Rank 1 works for twice the patience, and shows that it gets on."""
    with world("cpu", PATIENCE) as here:
        for _ in range(7 * here.rank):
            time.sleep(1)
            beat("a part of a long work")
        here.barrier()


def hang() -> None:
    """Rank 1 never comes."""
    with world("cpu", PATIENCE) as here:
        here.barrier()
        if here.rank == 1:
            beat("a work without end")
            time.sleep(600)
        here.gather(here.rank)


def stand_still() -> None:
    """Rank 1 stops as a whole, so that no thread of it shows any sign."""
    with world("cpu", PATIENCE) as here:
        here.barrier()
        if here.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        here.barrier()


def fail() -> None:
    """Rank 1 alone makes a mistake."""
    with world("cpu") as here:
        if here.rank == 1:
            raise UserError("a mistake that only this process sees")
        here.barrier()


def meet_often() -> None:
    """More often than the store remembers."""
    with world("cpu") as here:
        began = time.monotonic()
        for number in range(3 * KEPT):
            assert here.gather(number) == [number, number]
        print((time.monotonic() - began) / 3 / KEPT)
