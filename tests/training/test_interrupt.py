"""When a signal may break what is going on, and when it waits."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from draftplus.errors import Interrupted
from draftplus.training.interrupt import interruption
from draftplus.training.optim import Ema


@pytest.fixture(autouse=True)
def handlers() -> Any:
    """None of these tests leaves one behind."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_breaks_only_what_may_be_abandoned(number: int) -> None:
    done = []
    with interruption() as interrupt:
        stop(number)
        done.append("what must be whole")
        with pytest.raises(Interrupted), interrupt.abandonable():
            done.append("another step")
    assert done == ["what must be whole"]
    with interruption() as interrupt, pytest.raises(Interrupted), interrupt.abandonable():
        stop(number)
        done.append("the rest of the step")
    assert done == ["what must be whole"]


def test_it_breaks_once() -> None:
    """The second signal comes while what the first one broke is being tidied up, or what was complete is saved."""
    done = []
    with interruption() as interrupt:
        try:
            with interrupt.abandonable():
                try:
                    stop()
                finally:
                    stop()
                    done.append("tidied up")
        except Interrupted:
            stop()
            done.append("saved")
    assert done == ["tidied up", "saved"]


def test_the_averaged_weights_are_never_left_in_place() -> None:
    """A signal at any line of an evaluation leaves the raw weights, bit by bit."""
    parameters = {"w": torch.nn.Parameter(torch.randn(5))}
    ema = Ema(parameters, 0.5)
    parameters["w"].data += 1
    raw = parameters["w"].detach().clone()

    def evaluation(interrupt: Any) -> None:
        with ema.applied(parameters), interrupt.abandonable():
            for _ in range(3):
                pass

    for line in range(1000):
        seen = 0

        def trace(frame: Any, event: str, _: Any, at: int = line) -> Callable[..., Any] | None:
            nonlocal seen
            seen += 1
            if seen == at:
                sys.settrace(None)
                stop()
            return trace

        with interruption() as interrupt:
            sys.settrace(trace)
            try:
                evaluation(interrupt)
            except Interrupted:
                pass
            finally:
                sys.settrace(None)
        assert torch.equal(parameters["w"], raw), f"after a signal at traced line {line}"
        if seen < line:
            break
    assert 10 < line < 999, "the signal never came, or the evaluation never ended"


def test_other_threads_train_without_it() -> None:
    left = []

    def work() -> None:
        with interruption() as interrupt, interrupt.abandonable():
            left.append(interrupt.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == [False]
