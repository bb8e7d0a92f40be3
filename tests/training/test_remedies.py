"""Dropout and dissimilarity in whole runs."""

from __future__ import annotations

import pytest

from draftplus.config import load_config
from draftplus.errors import UserError
from tests.support.runs import fingerprint, rows, train_here

CLIP = "reward={emoji_clip: {args: {dropout: 0.2}}}"


@pytest.mark.slow
def test_a_run_with_dropout_continues_exactly(settings: list[str]) -> None:
    settings = [*settings, "objective.method=draft_lv"]  # which asks the reward more than once in a pass
    whole = train_here(settings, CLIP, "name=whole")
    run = train_here(settings, CLIP, "train.steps=2")
    train_here(settings, CLIP)
    assert fingerprint(run) == fingerprint(whole)
    other = train_here(settings, "reward=emoji_clip", "name=other")
    assert fingerprint(other) != fingerprint(whole)
    assert rows(other / "eval.jsonl")[0] == rows(whole / "eval.jsonl")[0], "evaluation has no noise"


@pytest.mark.slow
def test_dropout_does_not_depend_on_micro_batches(settings: list[str]) -> None:
    whole, parts = (
        rows(train_here(settings, CLIP, f"name={n}", f"train.micro_batch_size={n}", "train.steps=1") / "metrics.jsonl")
        for n in (4, 1)
    )
    for key, value in whole[0].items():
        assert parts[0][key] == pytest.approx(value, rel=1e-4), key


def test_dissimilarity_beside_another_reward(settings: list[str]) -> None:
    config = load_config("emoji", ["reward.dissimilarity.weight=3"])
    assert {name: one.weight for name, one in config.reward.items()} == {"emoji_clip": 1.0, "dissimilarity": 3.0}
    row = rows(train_here(settings, "reward.dissimilarity.weight=3", "train.steps=1") / "metrics.jsonl")[0]
    parts = {name: value for name, value in row.items() if name.startswith("reward/")}
    assert len(parts) == 2 and 0 < parts["reward/dissimilarity"] < 2
    rest = sum(value for name, value in parts.items() if name != "reward/dissimilarity")
    assert row["reward"] == pytest.approx(rest + 3 * parts["reward/dissimilarity"], rel=1e-5)


def test_dissimilarity_of_one_image(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"set train\.micro_batch_size to 2 or more"):
        train_here(settings, "reward=dissimilarity", "train.micro_batch_size=1")
