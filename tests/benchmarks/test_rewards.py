"""The benchmark of rewards measures what it says, and the docs have its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import rewards
from draftplus.build import REWARDS
from draftplus.rewards import hpsv2


def test_every_reward_that_is_measured_is_in_the_docs() -> None:
    assert set(rewards.CASES) <= set(REWARDS)
    assert not rewards.off("hpsv2", {"weights": 3860, "picture": 415})
    assert len(rewards.off("hpsv2", {"weights": 3860 * 1.2, "picture": 415 / 1.2})) == 2
    assert rewards.off("clip_h", {"weights": 1, "picture": 1}), "a reward without a row was passed over"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_reward_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv2, "VIT_H", hpsv2.VIT_H)  # which the benchmark replaces
    found = rewards.exactness("hpsv2", tmp_path)
    assert max(found.values()) < 1e-4
    found = rewards.cost("hpsv2", tmp_path)
    # 7 million parameters; the picture needs the features of 2 layers and itself, resized
    assert 1 < found["picture"] < 400 and found["seconds"] > 0
    assert rewards.row("hpsv2", {**found, "plain": 0, "resized": 0, "gradient": 0}).count("|") == 10
