"""What a user's reward may change and must not: the state that all code in a process shares."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy
import torch


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _go_to(directory: str | None) -> None:
    if directory is not None:
        os.chdir(directory)


def _set_default_device(device: torch.device) -> None:
    # "cpu" is what holds where none was set; setting it too would slow down every operation
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with warnings.catch_warnings():  # which makes Python forget what it remembers of the former filters
        pass


def _set_handlers(handlers: Mapping[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # None: another language's
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# what is told of it: how it is read, and set
_SHARED: Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda flags: torch.use_deterministic_algorithms(flags[0], warn_only=flags[1]),
    ),
    "torch's precision of matrix products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
    ),
    "cuDNN's settings": (
        lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        lambda flags: torch.backends.cudnn.set_flags(flags[0], _benchmark=flags[1], _deterministic=flags[2]),
    ),
    "torch's autocast": (
        lambda: {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")},
        lambda flags: [torch.set_autocast_enabled(device, on) for device, on in flags.items()],
    ),
    "torch's anomaly detection": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the working directory": (_directory, _go_to),
    "the warnings' filters": (lambda: list(warnings.filters), _set_filters),
    "the handlers of signals": (lambda: {number: signal.getsignal(number) for number in _SIGNALS}, _set_handlers),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
}  # fmt: skip


class Randomness(NamedTuple):
    """Where the global generators stand, of which every reward has a sequence of its own."""

    torch: torch.Tensor
    cuda: list[torch.Tensor]
    numpy: Any
    python: Any

    @staticmethod
    def now() -> Randomness:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return Randomness(torch.get_rng_state(), cuda, numpy.random.get_state(), random.getstate())

    def put_back(self) -> None:
        torch.set_rng_state(self.torch)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)
        numpy.random.set_state(self.numpy)
        random.setstate(self.python)


class Unharmed:
    """Around all that runs of one reward's code: what it changes is set back, and said once.

    What it draws from the global generators goes on from where it stood, and changes nobody else's draws.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.said: set[str] = set()
        self.own: Randomness | None = None

    @contextmanager
    def __call__(self, when: str) -> Iterator[None]:
        """when: such as "when it was called"."""
        before = {what: read() for what, (read, _) in _SHARED.items()}
        random_before = Randomness.now()
        if self.own is not None:
            self.own.put_back()
        try:
            yield
        finally:
            self.own = Randomness.now()
            random_before.put_back()
            changed = [what for what, (read, _) in _SHARED.items() if read() != before[what]]
            for what in changed:
                with suppress(OSError):  # a working directory that is gone
                    _SHARED[what][1](before[what])
            new = [what for what in changed if what not in self.said]
            if new:
                self.said.update(new)
                print(
                    f"reward '{self.name}' changed {' and '.join(new)} {when}; this was set back, so that the run goes "
                    "on as it is configured",
                    file=sys.stderr,
                )
