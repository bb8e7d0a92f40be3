"""A process that another one started ends with it: a sweep's runs with the sweep, torchrun's ranks with torchrun."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

SWEEP = "DRAFTPLUS_SWEEP_PID"  # set for a sweep's runs
TORCHRUN = "TORCHELASTIC_RUN_ID"
BETWEEN_LOOKS = 1.0  # seconds

_watching: list[threading.Thread] = []


def end_with_launcher() -> None:
    """Where a sweep or torchrun started this process, asks it to stop, as SIGTERM does, once that is gone.

    A killed launcher cannot tell its processes; they would train on unseen, or wait for one another for hours. Whoever
    starts processes in another way may leave them alone.
    """
    parent, sweep = os.getppid(), os.environ.get(SWEEP)
    if sweep is not None and sweep != str(parent) and not _is_alive(int(sweep)):
        sys.exit(1)  # it was gone before this process could look
    if not _watching and (sweep == str(parent) or TORCHRUN in os.environ):
        _watching.append(threading.Thread(target=_watch, args=(parent,), daemon=True))
        _watching[0].start()


def is_main_process() -> bool:
    """Whether this process is the one that prints, also before and after it joins the others."""
    return os.environ.get("RANK", "0") == "0"


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
