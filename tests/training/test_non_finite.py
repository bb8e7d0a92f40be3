"""A step whose loss or gradient is not finite is skipped and counted; at the first, or too many, it is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from draftplus.errors import UserError
from tests.support import rewards
from tests.support.runs import rows, train_here, weights

EVERY = ["checkpoint.every=1", "checkpoint.keep=100", "optim.ema=0.5"]
MANY = 10


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_but_the_count(settings: list[str], where: str) -> None:
    """Neither weights nor moments nor average; and the steps after it go on."""
    run = train_here(settings, *EVERY, reward="Flaky", bad=[2], where=where)
    before, during, after = (weights(run / "checkpoints" / f"step-{step:06d}") for step in (2, 3, 4))
    assert before.keys() == during.keys()
    assert all(torch.equal(before[name], during[name]) for name in before)
    assert any(not torch.equal(during[name], after[name]) for name in after)
    recorded = rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in recorded] == [0, 0, 1, 1]
    assert (recorded[2]["loss"] is None) == (where == "loss")
    assert recorded[2]["grad_norm"] is None
    assert all(row["grad_norm"] is not None for row in recorded if row["step"] != 3)
    numbers = json.loads((run / "checkpoints" / "step-000004" / "state.json").read_text())
    assert numbers["skipped"] == 1 and numbers["skipped_in_a_row"] == 0


@pytest.mark.slow
def test_without_it_the_weights_would_be_lost(settings: list[str]) -> None:
    """The same run with a good third step ends elsewhere, finite both."""
    flaky, good = (
        train_here(settings, f"name={name}", reward="Flaky", bad=bad) for name, bad in (("a", [2]), ("b", []))
    )
    ours, theirs = weights(flaky / "adapter"), weights(good / "adapter")
    assert all(tensor.isfinite().all() for tensor in ours.values())
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_the_first_step(settings: list[str], tmp_path: Path, where: str) -> None:
    with pytest.raises(UserError, match="not finite at the first step") as error:
        train_here(settings, reward="Flaky", bad=[0], where=where)
    assert ("Flaky" in str(error.value)) == (where == "loss")
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_the_reward_at_fault_is_named(settings: list[str]) -> None:
    more = "reward={tests.support.rewards:redness: {}, tests.support.rewards:always_nan: {weight: 0.5}}"
    with pytest.raises(UserError, match=r"reward 'tests\.support\.rewards:always_nan' is not finite"):
        train_here(settings, more)


@pytest.mark.slow
@pytest.mark.parametrize("count", [MANY - 1, MANY])
def test_too_many_in_a_row(settings: list[str], count: int) -> None:
    steps = [*settings, "train.steps=14", "train.global_batch_size=1", "checkpoint.every=1"]
    if count < MANY:
        run = train_here(steps, reward="Flaky", bad=list(range(1, 1 + count)))
        assert rows(run / "metrics.jsonl")[-1]["skipped"] == count
        return
    with pytest.raises(UserError, match="in 10 updates in a row"):
        train_here(steps, reward="Flaky", bad=list(range(1, 1 + count)))


@pytest.mark.slow
def test_the_count_goes_on_where_a_run_is_continued(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five bad steps before a stop and five after it are ten in a row."""
    steps = [*settings, "train.global_batch_size=1", "checkpoint.every=1"]
    run = train_here(steps, "train.steps=6", reward="Flaky", bad=[1, 2, 3, 4, 5])
    assert rows(run / "metrics.jsonl")[-1]["skipped"] == 5
    monkeypatch.setattr(rewards, "redness", lambda images, prompts: images.mean((1, 2, 3)) * float("nan"))
    with pytest.raises(UserError, match="in 10 updates in a row"):
        train_here(steps, "train.steps=14", reward="Flaky", bad=[1, 2, 3, 4, 5])
    assert rows(run / "metrics.jsonl")[-1]["skipped"] == 9


@pytest.mark.slow
def test_a_bad_evaluation_is_recorded_and_not_chosen(settings: list[str]) -> None:
    """Evaluation alone does not stop a run: its numbers are null, and no step of them is the best."""
    run = train_here(settings, "eval.every=2", "eval.rewards={tests.support.rewards:always_nan: {}}")
    for row in rows(run / "eval.jsonl"):
        assert row["reward/tests.support.rewards:always_nan"] is None
        assert set(row["per_image"]["tests.support.rewards:always_nan"]) == {None}
        assert row["reward"] is not None
    assert json.loads((run / "best.json").read_text())["step"] in (2, 4)
