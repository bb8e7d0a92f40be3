"""What this process is at, and how often it has got on: processes that wait for it look at this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Pulse:
    """beats: grows with every sign of progress. doing: what the latest that said so was about."""

    beats: int = 0
    doing: str = "starting"


PULSE = Pulse()


def beat(doing: str | None = None) -> None:
    """A sign of progress. To be given where work goes on, and never by waiting."""
    PULSE.beats += 1
    PULSE.doing = doing or PULSE.doing
