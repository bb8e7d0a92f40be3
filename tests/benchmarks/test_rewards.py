"""The benchmark of rewards measures what it says, and the docs have its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import rewards
from draftplus.rewards.names import REWARDS


def test_every_reward_that_is_measured_is_in_the_docs() -> None:
    assert set(rewards.CASES) <= set(REWARDS)
    assert not rewards.off("hpsv2", {"weights": 3860, "picture": 415})
    assert len(rewards.off("hpsv2", {"weights": 3860 * 1.2, "picture": 415 / 1.2})) == 2
    assert rewards.off("clip_h", {"weights": 1, "picture": 1}), "a reward without a row was passed over"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_reward_is_measured(tmp_path: Path) -> None:
    found = rewards.in_a_fresh_process("exactness", "aesthetic", str(tmp_path))
    assert found["plain"] < 1e-4 and found["resized"] < 1e-2 and found["gradient"] < 1e-4
    found |= rewards.in_a_fresh_process("cost", "aesthetic", str(tmp_path))
    # the tokenizer and the libraries' code count as weights; what loading let go again may serve so small a network
    assert 0 <= found["picture"] < 100 and 20 < found["weights"] < 300 and found["seconds"] > 0
    assert rewards.row("aesthetic", found).count("|") == 10
