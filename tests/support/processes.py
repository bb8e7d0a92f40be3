"""Processes that run a command as `python -m draftplus` does, forked from a server that has imported everything.

Importing the libraries takes most of a short command's time; a signal or a kill needs a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def import_everything() -> None:
    """What the server imports, once."""
    import diffusers
    import transformers

    import draftplus.api
    import draftplus.cli
    import draftplus.models.stable_diffusion  # noqa: F401

    for name in ("AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)


if multiprocessing.current_process().name == "MainProcess" and "forkserver" in " ".join(sys.argv + sys.orig_argv):
    import_everything()

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.processes"])


class Child:
    """A process that runs a function; what it prints goes to files."""

    def __init__(
        self, target: Callable[..., Any], arguments: Sequence[Any], directory: Path, environment: Mapping[str, str],
        daemon: bool = True,
    ) -> None:  # fmt: skip
        self.out, self.err = directory / "stdout.txt", directory / "stderr.txt"
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src"), *([before] if before else [])])
        try:  # the server takes its environment from here when the first process is started
            self.process = _context.Process(
                target=_run,
                args=(target, tuple(arguments), directory, dict(environment), self.out, self.err),
                daemon=daemon,  # a test that fails leaves none behind; but one of those may start no others
            )
            self.process.start()
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)

    def wait(self, seconds: float = 120) -> int:
        """The exit code; minus the signal's number where one killed it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.err.read_text()}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Until the condition holds; an error where the process ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}:\n{self.err.read_text()}"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)


def command(arguments: Sequence[str], directory: Path, **environment: str) -> Child:
    """`python -m draftplus ARGUMENTS` in a directory."""
    return Child(_command, [list(arguments)], directory, environment)


def ranks(target: Callable[..., Any], arguments: Sequence[Any], directory: Path, size: int) -> list[Child]:
    """One process for each rank, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        own = directory / f"rank{rank}"
        own.mkdir(parents=True, exist_ok=True)
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        children.append(Child(target, arguments, own, environment))
    return children


def compiled(arguments: list[str]) -> None:
    """A command whose blocks are compiled as far as their graphs, which are counted: a C++ compiler takes minutes."""
    from torch._dynamo.utils import counters

    from draftplus.models import compiling

    compiling.BACKEND = "aot_eager"
    try:
        _command(arguments)
    finally:
        print(counters["stats"]["unique_graphs"], "graphs")


def commands(arguments: Sequence[str], directory: Path, size: int) -> list[Child]:
    """A command on several ranks."""
    return ranks(_command, [list(arguments)], directory, size)


def _command(arguments: list[str]) -> None:
    from draftplus.cli import main

    sys.argv = ["draftplus", *arguments]
    main()


def _run(
    target: Callable[..., Any], arguments: tuple[Any, ...], directory: Path, environment: dict[str, str], out: Path,
    err: Path,
) -> None:  # fmt: skip
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(directory)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    target(*arguments)
