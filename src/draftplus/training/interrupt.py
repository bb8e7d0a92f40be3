"""SIGTERM and Ctrl-C: leave at once while only a gradient is in flight, after it while weights are being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from draftplus.errors import Interrupted


class Interruption:
    """Whether a stop was asked for. Inside `abandonable` it raises there; elsewhere it waits for the next one."""

    def __init__(self) -> None:
        self.asked = False
        self._abandonable = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._abandonable:
            self._abandonable = False  # once: a second signal must not break what is being saved
            raise Interrupted

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that may be thrown away at any point.

        Raises Interrupted as soon as a stop is asked for.
        """
        self._abandonable = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._abandonable = False


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Listens for SIGTERM and SIGINT; signals reach only the main thread, elsewhere nothing is caught."""
    state = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {number: signal.signal(number, state._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
