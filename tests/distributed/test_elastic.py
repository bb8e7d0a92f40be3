"""A rank that is killed is replaced, and the run goes on from its last checkpoint as if nothing had happened.

DRAFTPLUS_KILLS=20 in the environment kills at as many random moments, instead of three.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from tests.support.elastic import Agent, kill_at_random
from tests.support.processes import commands
from tests.support.runs import REWARDS, fingerprint, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc"),
    pytest.mark.timeout(3600),
]

KILLS = int(os.environ.get("DRAFTPLUS_KILLS", "3"))
RESTARTS = 3
STEPS = 24
MORE = (f"reward={REWARDS}:redness", f"train.steps={STEPS}", "eval.every=8", "checkpoint.every=3", "optim.ema=0.5")


def test_killed_ranks_are_replaced(settings: list[str], tmp_path: Path) -> None:
    """Weights and every number are those of a run that nobody interrupted, bit for bit; nothing is left lying about."""
    for child in (reference := commands(["train", *settings, *MORE, "name=whole"], tmp_path / "whole", 2)):
        assert child.wait() == 0, reference[0].err.read_text()
    whole, left, number = tmp_path / "runs" / "whole", KILLS, 0
    while left:
        run, number = tmp_path / "runs" / f"killed{number}", number + 1
        arguments = ["train", *settings, *MORE, f"name={run.name}"]
        with Agent(arguments, tmp_path / f"agent{number}", max_restarts=RESTARTS) as agent:
            seen, draw = set[int](), random.Random(number)
            for _ in range(min(left, RESTARTS)):
                told = kill_at_random(agent, run, STEPS, draw, seen)
                print(run.name, told)
                left -= told is not None
            assert agent.child.wait() == 0, agent.child.err.read_text()
        assert fingerprint(run) == fingerprint(whole)
        evaluated = [[{**row, "seconds": 0} for row in rows(one / "eval.jsonl")] for one in (run, whole)]
        assert evaluated[0] == evaluated[1]
        assert _files(run) == _files(whole)


def _files(run: Path) -> list[str]:
    """Of checkpoints before the last, any step will do: the rank that is left saves where it is when it is stopped."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return sorted(re.sub(rf"^checkpoints/step-(?!{STEPS:06d}/)\d+/", "checkpoints/earlier/", name) for name in names)
