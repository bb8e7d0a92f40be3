"""An error ends a run as a stop does: what was complete is saved, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.errors import UserError
from draftplus.runs import journal
from draftplus.runs.directory import saved_steps
from draftplus.training import update as updating
from draftplus.training.optim import Ema
from tests.support.processes import commands
from tests.support.runs import REWARDS, fingerprint, rows, train_here, weights
from tests.training.test_drive import Fit, fit

RARE = ["checkpoint.every=100", "eval.every=100"]


def assert_same(run: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(run / name) == rows(whole / name)
    assert (run / "adapter" / "w.json").read_text() == (whole / "adapter" / "w.json").read_text()


def test_no_step_is_lost(tmp_path: Path, capsys: Any) -> None:
    fit(tmp_path / "whole", 10, None, *RARE)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", 10, 7, *RARE)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [7]
    assert f"stopped after step 7; continue with: draftplus train {tmp_path / 'run'}" in capsys.readouterr().err
    fit(tmp_path / "run", 10, None, *RARE)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_the_first_step(tmp_path: Path, capsys: Any) -> None:
    """There is nothing to save, and nothing to say."""
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", 10, 0, *RARE)
    assert saved_steps(tmp_path / "run" / "checkpoints") == []
    assert capsys.readouterr().err == ""


def test_an_evaluation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path / "whole", 10, None, *RARE)
    evaluate = Fit.evaluate

    def failing(self: Fit, step: int, advance: Any) -> dict[str, Any]:
        if step == 10:
            raise ZeroDivisionError
        return evaluate(self, step, advance)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Fit, "evaluate", failing)
        fit(tmp_path / "run", 10, None, *RARE)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [10]
    fit(tmp_path / "run", 10, None, *RARE)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["average", "row"])
def test_half_a_step_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An update without its average, or a step without its row, is no state to continue from: the one before is."""
    fit(tmp_path / "whole", 10)
    calls = 0

    def failing(*given: Any) -> None:
        nonlocal calls
        calls += where == "average" or given[0].name == "metrics.jsonl"
        if calls == 8 and (where == "average" or given[0].name == "metrics.jsonl"):
            raise MemoryError
        original(*given)

    target, name = (Ema, "update") if where == "average" else (journal, "append_row")
    original = getattr(target, name)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(target, name, failing)
        fit(tmp_path / "run", 10)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    fit(tmp_path / "run", 10)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_the_error_of_the_training_is_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from draftplus.training import checkpoint

    def full(*_: Any) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", 10, 7, *RARE)
    assert "the state after step 7 could not be saved: no space left" in capsys.readouterr().err


def test_a_guard_of_ten_updates(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite for too long ends the run; mended, it continues as if it had been so from then on."""
    monkeypatch.setattr(updating, "MOST_SKIPPED_IN_A_ROW", 2)
    settings = [*settings, *RARE, "train.steps=6"]
    with pytest.raises(UserError, match="not finite in 2 updates in a row"):
        train_here(settings, reward="Flaky", bad=[2, 3])
    run = Path(settings[0]).parent / "runs" / "run"
    assert saved_steps(run / "checkpoints") == [3]
    state = json.loads((run / "checkpoints" / "step-000003" / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_a_row"]) == (1, 1)
    train_here(settings, reward="Flaky", bad=[2, 3])  # counts from 0 again: its next three calls are good but one
    whole = train_here([*settings, "name=whole"], reward="Flaky", bad=[2, 5])
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_on_two_ranks(settings: list[str], tmp_path: Path) -> None:
    """A reward that raises on one of them: the other saves what both had completed."""
    settings = [*settings, *RARE, f"reward={REWARDS}:breakable", "objective.kl_coeff=0.5"]
    directory = tmp_path / "broken"
    (directory / "rank1").mkdir(parents=True)
    (directory / "rank1" / "break-at").write_text("2")
    children = commands(["train", *settings], directory, 2)
    assert [child.wait() for child in children] == [1, 1]
    assert "ZeroDivisionError" in children[1].err.read_text()
    assert "stopped after step 2; continue with" in children[0].err.read_text()
    for child in (two := commands(["train", *settings, "train.steps=2", "name=two"], tmp_path / "two", 2)):
        assert child.wait() == 0, two[0].err.read_text()
    (ours,) = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
    saved, whole = (weights(run / "checkpoints" / ours.name) for run in (ours.parents[1], ours.parents[2] / "two"))
    assert ours.name == "step-000002" and saved.keys() == whole.keys()
    assert all(torch.equal(saved[name], whole[name]) for name in whole)
