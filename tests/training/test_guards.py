"""Guards against reward hacking: they end a run for the stated reason, and change nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Never

import pytest

from draftplus.config import RewardConfig, StopConfig
from draftplus.errors import UserError
from draftplus.runs.directory import saved_steps
from draftplus.training.guards import stop_reason, write_best
from tests.support.runs import fingerprint, rows, train_here

NAN = float("nan")
HELD_OUT = "reward/quality"


def evaluated(*measured: tuple[float | None, float | None]) -> list[dict[str, float | None]]:
    """Rows of (LPIPS, held-out reward) at steps 0, 10, 20, …; what is trained rises all the time."""
    return [
        {"step": 10 * i, "reward": float(i), "lpips": lpips, HELD_OUT: quality}
        for i, (lpips, quality) in enumerate(measured)
    ]


@pytest.mark.parametrize(
    ("lpips", "says"),
    [
        ((0.4,), None),
        ((0.4, 0.21), None),
        ((0.4, 0.2), None),  # the floor itself is allowed
        ((0.4, 0.19), "48% of the base model's 0.4"),
        ((0.4, 0.19, 0.3), None),  # it came back: only the latest counts
        ((0.4, NAN), "LPIPS is not finite"),
        ((0.4, None), "LPIPS is not finite"),  # the same, read from disk
        ((None, 0.4), "LPIPS is not finite"),
    ],
)
def test_diversity_floor(lpips: tuple[float | None, ...], says: str | None) -> None:
    reason = stop_reason(evaluated(*((value, 0.0) for value in lpips)), StopConfig(diversity_floor=0.5), [])
    assert reason is None if says is None else says in str(reason)


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        ((5.0, 4.1), None),
        ((5.0, 3.9), "1.1 below its best of 5 at step 0"),
        ((5.0, 6.0, 5.1), None),
        ((5.0, 6.0, 4.5), "1.5 below its best of 6 at step 10"),
        ((5.0, NAN), "not finite"),
        ((5.0, None), "not finite"),
        ((NAN, 5.0, 3.0), "2 below its best of 5 at step 10"),
    ],
)
def test_held_out_drop(quality: tuple[float | None, ...], says: str | None) -> None:
    reason = stop_reason(evaluated(*((0.4, value) for value in quality)), StopConfig(held_out_drop=1.0), ["quality"])
    assert reason is None if says is None else says in str(reason)


def test_a_reward_that_was_not_measured_yet_ends_nothing() -> None:
    assert stop_reason(evaluated((0.4, 5.0), (0.4, 5.0)), StopConfig(held_out_drop=1.0), ["new", "quality"]) is None


def test_no_guard_no_end() -> None:
    assert stop_reason(evaluated((0.4, 5.0), (0.0, -5.0)), StopConfig(), ["quality"]) is None


@pytest.mark.parametrize(("floor", "best"), [(None, 30), (0.5, 20), (0.95, None)])
def test_the_best_step_respects_the_floor(tmp_path: Path, floor: float | None, best: int | None) -> None:
    measured = evaluated((0.4, 0.0), (0.3, 0.0), (0.25, 0.0), (0.1, 0.0), (None, 0.0))
    measured[-1]["reward"] = -1.0
    write_best(tmp_path, measured, {"trained": RewardConfig()}, StopConfig(diversity_floor=floor))
    if best is None:
        assert not (tmp_path / "best.json").exists()
        return
    told = json.loads((tmp_path / "best.json").read_text())
    assert told["step"] == best
    assert ("LPIPS of at least 0.5" in told["rule"]) is (floor is not None)


def _fails(*_: object) -> Never:
    raise UserError("not finite")


@pytest.mark.slow
def test_a_guarded_run_ends_and_can_go_on(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*settings, "eval.rewards={tests.support.rewards:paleness: {}}", "train.steps=6", "eval.every=2"]
    run = train_here(settings, "stop.held_out_drop=1e-9")
    stopped = json.loads((run / "stopped.json").read_text())
    assert stopped["step"] == 2 and "paleness" in stopped["reason"]
    assert stopped["reason"] in capsys.readouterr().err
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [0, 2]
    assert saved_steps(run / "checkpoints")[-1] == 2 and (run / "adapter").is_dir()

    before = fingerprint(run)
    assert fingerprint(train_here(settings, "stop.held_out_drop=1e-9")) == before  # again: it has ended already

    with pytest.raises(
        UserError, match=r"stop\.held_out_drop=1 compares with the evaluation of step 0, which used other"
    ):
        train_here(settings, "stop.held_out_drop=1", "eval.images_per_prompt=3")

    with pytest.raises(UserError, match="not finite"), monkeypatch.context() as patch:
        patch.setattr("draftplus.training.fine_tuning.gradient_step", _fails)
        train_here(settings)
    assert not (run / "stopped.json").exists()  # it has gone on, though not to its end

    assert train_here(settings) == run  # without the guard it goes on, as if it had never been stopped
    assert not (run / "stopped.json").exists()
    assert fingerprint(run) == fingerprint(train_here(settings, "name=whole"))
