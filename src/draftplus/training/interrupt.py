"""SIGTERM and Ctrl-C: leave at once while only a gradient is in flight, after it while weights are being written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from draftplus.errors import Interrupted

if TYPE_CHECKING:  # a sweep waits for its runs without torch
    from draftplus.distributed.meeting import Meeting


class Interruption:
    """Whether a stop was asked for. Inside `abandonable` it raises there; elsewhere it waits for the next one.

    Where processes meet, the meeting raises, on all of them. may_leave: whether what is going on may be thrown away.
    """

    def __init__(self, meeting: Meeting | None = None) -> None:
        self.asked = self.may_leave = False
        self._meeting = meeting

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.may_leave and not (self._meeting is not None and self._meeting.holds):
            self.may_leave = False  # once: a second signal must not break what is being saved
            raise Interrupted

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work that may be thrown away at any point.

        Raises Interrupted as soon as a stop is asked for.
        """
        self.may_leave = True
        try:
            if self.asked and not (self._meeting is not None and self._meeting.inseparable):
                raise Interrupted
            yield
        finally:
            self.may_leave = False


@contextmanager
def interruption(meeting: Meeting | None = None) -> Iterator[Interruption]:
    """Listens for SIGTERM and SIGINT; signals reach only the main thread, elsewhere nothing is caught.

    meeting: of the processes that are all to stop where one is asked to.
    """
    state = Interruption(meeting)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    before = {number: signal.signal(number, state._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    if meeting is not None:
        meeting.listen(state)
    try:
        yield state
    finally:
        if meeting is not None:
            meeting.listen(None)
        for number, handler in before.items():
            signal.signal(number, handler)
