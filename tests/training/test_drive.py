"""The loop trains whatever has steps and evaluations, and continues it exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.config import Config, load_config
from draftplus.distributed import World
from draftplus.progress import Advance
from draftplus.training.drive import drive
from draftplus.training.optim import learning_rate
from draftplus.training.state import State, initial_state, numbers_of, put_back, tensors_of
from draftplus.training.update import update
from tests.support.runs import rows
from tests.tiny import CPU

HERE = World(0, 1, CPU)


@dataclass
class Fit:
    """Fits a vector to a target: no diffusion model, no reward, no image."""

    config: Config
    run: Path
    total: int
    parameters: dict[str, torch.nn.Parameter] = field(
        default_factory=lambda: {"w": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(1))}
    )
    finished: list[int] = field(default_factory=list)
    fails_at: int | None = None

    def loss(self) -> torch.Tensor:
        return ((self.parameters["w"] + self.parameters["b"] - torch.tensor([1.0, 2.0, 3.0])) ** 2).mean()

    def step(self, state: State, abandonable: Any) -> dict[str, float]:
        if state.step == self.fails_at:
            raise ZeroDivisionError
        with abandonable():
            loss = self.loss()
            loss.backward()
        means = {"loss": float(loss.detach())}
        return {**means, "grad_norm": update(state, self.config.optim, means)}

    def note(self, row: dict[str, Any]) -> str:
        return f"loss {row['loss']:.3f}"

    def evaluate(self, step: int, advance: Advance) -> dict[str, Any]:
        advance(step, "evaluating")
        return {"step": step, "accuracy": 1 / (1 + float(self.loss().detach()))}

    def comparable(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(rows)

    def stop_reason(self, rows: Sequence[dict[str, Any]]) -> str | None:
        return "good enough" if rows and rows[-1]["accuracy"] > 0.9 else None

    def write_best(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            (self.run / "best.json").write_text(json.dumps(max(rows, key=lambda row: row["accuracy"])))

    def save(self, directory: Path | None) -> None:
        assert directory is not None
        (directory / "w.json").write_text(json.dumps([p.tolist() for p in self.parameters.values()]))

    def before(self, evaluated: Sequence[int], step: int) -> None:
        pass

    def finish(self, step: int, advance: Advance) -> None:
        self.finished.append(step)


def configured(tmp_path: Path, *more: str) -> Config:
    few = ["eval.every=4", "checkpoint.every=2", "log.to=[]", "optim.lr=0.05", "optim.ema=0.5", "optim.warmup_steps=2"]
    return load_config(None, [f"output_dir={tmp_path}", *few, *more])


def fit(run: Path, total: int, fails_at: int | None = None, *more: str) -> Fit:
    run.mkdir(exist_ok=True)
    task = Fit(configured(run.parent, *more), run, total, fails_at=fails_at)
    drive(task, task.config, run, HERE)
    return task


def test_another_task_is_trained_and_continued_exactly(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 10)
    assert whole.finished == [10]
    assert [row["step"] for row in rows(tmp_path / "whole" / "eval.jsonl")] == [0, 4, 8, 10]
    losses = [row["loss"] for row in rows(tmp_path / "whole" / "metrics.jsonl")]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", 10, 7)
    fit(tmp_path / "run", 10)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(tmp_path / "run" / name) == rows(tmp_path / "whole" / name)
    for place in ("adapter", "adapters/step-000004"):
        results = [(tmp_path / name / place / "w.json").read_text() for name in ("run", "whole")]
        assert results[0] == results[1]


def test_its_own_guard_ends_it(tmp_path: Path) -> None:
    task = fit(tmp_path / "run", 400, None, "optim.lr=0.2")
    (last,) = task.finished
    assert last % 4 == 0 and last < 400
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"step": last, "reason": "good enough"}
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == last


def test_a_state_comes_back_from_its_tensors_and_numbers() -> None:
    """Exactly, also into a state that has been elsewhere; and where anything is missing, nothing is changed."""
    config = configured(Path("x"))

    def made(steps: int) -> tuple[Fit, State]:
        task = Fit(config, Path("x"), 5)
        state = initial_state(task.parameters, config.optim)
        for _ in range(steps):
            task.step(state, nothing)
            state.step += 1
        return task, state

    _, source = made(3)
    for steps in (0, 1):
        task, target = made(steps)
        groups = {name: {k: t.clone() for k, t in group.items()} for name, group in tensors_of(source).items()}
        for lacking in ("step", "history"):
            before = {name: p.detach().clone() for name, p in target.parameters.items()}
            numbers = {key: value for key, value in numbers_of(source).items() if key != lacking}
            with pytest.raises(KeyError):
                put_back(target, groups, numbers)
            assert all(torch.equal(p, before[name]) for name, p in target.parameters.items())
        put_back(target, groups, json.loads(json.dumps(numbers_of(source))))
        assert numbers_of(target) == numbers_of(source)
        for name, group in tensors_of(source).items():
            assert all(torch.equal(tensors_of(target)[name][key], tensor) for key, tensor in group.items())
        task.step(target, nothing)
    _, longer = made(4)
    assert all(torch.equal(p, target.parameters[name]) for name, p in longer.parameters.items())


def nothing() -> AbstractContextManager[None]:
    from contextlib import nullcontext

    return nullcontext()


def test_steps_without_a_learning_rate_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fall = ("optim.warmup_steps=1", "optim.decay_steps=3")
    fit(tmp_path / "whole", 4, None, *fall)
    assert "learning rate" not in capsys.readouterr().err
    fit(tmp_path / "longer", 6, None, *fall)
    told = capsys.readouterr().err
    assert "the learning rate is 0 from step 5 on, where optim.decay_steps=3 ends, so the steps up to 6" in told
    moved = [learning_rate(configured(tmp_path, *fall).optim, step) > 0 for step in range(6)]
    assert moved == [True] * 4 + [False] * 2
