"""torchrun's agent, whose processes are forked instead of started anew, and how they are killed."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.processes import Child

CLONE_NEWNET = 0x40000000
HANDLERS = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


class Agent:
    """`torchrun OPTIONS -m draftplus ARGUMENTS` in a directory. options: those of torch's LaunchConfig.

    namespace: of `ip netns`, in which it lives.
    """

    def __init__(
        self, arguments: Sequence[str], directory: Path, namespace: str | None = None,
        environment: Mapping[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        given = [list(arguments), namespace, options]
        self.child = Child(_launch, given, directory, environment or {}, daemon=False)

    def ranks(self) -> dict[int, int]:
        """The processes that train now, or did last, by rank."""
        found = [path.name.split("-") for path in sorted(self.directory.glob("pid-*-*"), key=os.path.getmtime)]
        return {int(rank): int(process) for _, rank, process in found}

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves nothing behind."""
        self.child.process.kill()
        self.child.process.join()
        for process in self.ranks().values():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _launch(arguments: list[str], namespace: str | None, options: dict[str, Any]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if namespace is not None:
        with open(f"/run/netns/{namespace}") as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) == 0, "setns"
    standalone = {
        "min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0",
        "run_id": uuid.uuid4().hex, "monitor_interval": 0.1,
    }  # fmt: skip
    elastic_launch(LaunchConfig(**{**standalone, **options, "start_method": "fork"}), _work)(arguments)


def _work(arguments: list[str]) -> None:
    from draftplus.cli import main

    for number, handler in zip((signal.SIGTERM, signal.SIGINT), HANDLERS, strict=True):
        signal.signal(number, handler)  # not those of the agent
    Path(f"pid-{os.environ['RANK']}-{os.getpid()}").touch()
    sys.argv = ["draftplus", *arguments]
    main()


def kill_at_random(agent: Agent, run: Path, steps: int, draw: random.Random, seen: set[int]) -> str | None:
    """Kills a rank that was not there before, some time after it was started, or after as many steps as are drawn.

    Returns what was done; None where all had ended by then. seen: the processes of earlier attempts.
    """
    agent.child.wait_until(lambda: len(now := agent.ranks()) == 2 and not seen & set(now.values()))
    now, rank, late = agent.ranks(), draw.randrange(2), draw.random()
    seen |= set(now.values())
    if draw.random() < 0.3:
        when = f"{3 * late:.2f} s after its start"
        time.sleep(3 * late)
    else:
        target = draw.randint(min(steps_of(run), steps * 4 // 5), steps * 4 // 5)
        when = f"{late / 2:.2f} s after step {target}"
        agent.child.wait_until(lambda: steps_of(run) >= target)
        time.sleep(late / 2)
    done = steps_of(run)
    try:
        os.kill(now[rank], signal.SIGKILL)
    except ProcessLookupError:
        return None
    return f"rank {rank} killed {when}, with {done} steps done"


def steps_of(run: Path) -> int:
    """How many have their numbers written."""
    with suppress(OSError):
        return len((run / "metrics.jsonl").read_bytes().splitlines())
    return 0
