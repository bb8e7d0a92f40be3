"""Every family is trained by the command, by every method, and its runs continue exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from draftplus import api
from tests.families.cases import ONCE, Case, stock_picture, stock_pipe
from tests.families.conftest import Below
from tests.support.processes import command, commands
from tests.support.runs import relative, rows, small_settings, train_here, update_of, weights
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
METHODS = {
    "draft": ["objective.kl_coeff=0.5"],
    "draft-3": ["objective.grad_steps=3", "objective.kl_coeff=0.5", "objective.kl_space=x0"],
    "draft_lv": ["objective.method=draft_lv", "objective.kl_coeff=0.5"],
    "drtune": ["objective.method=drtune", "objective.grad_steps=2", "objective.kl_coeff=0.5"],
    "full": ["model.lora=null", "objective.kl_coeff=0.5", "optim.lr=1e-4"],
    "checkpointed": ["model.gradient_checkpointing=true", "model.dtype=bfloat16", "objective.kl_coeff=0.5"],
}


@pytest.fixture(params=ONCE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(case: Case, directory: Path, tmp_path: Path) -> list[str]:
    """A run of two steps in tmp_path/runs/run."""
    height, width = case.sizes[1]
    return [
        *small_settings(directory, tmp_path), "train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2",
        "checkpoint.every=1", "eval.max_prompts=1", f"sampler.height={height}", f"sampler.width={width}",
        f"sampler.guidance_scale={case.guided}",
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_run(settings: list[str], method: str) -> None:
    run = train_here(settings, *METHODS[method])
    made = rows(run / "metrics.jsonl")
    assert [row["step"] for row in made] == [1, 2]
    assert all(math.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in made)
    assert made[1]["kl"] > 0
    evaluated = rows(run / "eval.jsonl")
    assert evaluated[0]["reward"] != evaluated[-1]["reward"]


def test_a_merged_model(case: Case, settings: list[str], tmp_path: Path, below: Below) -> None:
    """In the stock pipeline, loaded from what export wrote alone, it draws what `generate` does."""
    run = train_here(settings, "train.steps=1", "optim.lr=0.1")
    merged = api.export(str(run), "merged", tmp_path / "merged")
    overrides = case.overrides(case.sizes[1], 3, case.guided)
    ours = api.generate(str(run), ["a cat"], [1], overrides)
    theirs = stock_picture(stock_pipe(merged), "a cat", 1, **case.call(case.sizes[1], 3, case.guided))
    below("merged", (ours - theirs).abs().max(), 1e-3)
    assert (ours - api.generate(str(run), ["a cat"], [1], overrides, lora_scale=0)).abs().max() > 1e-2


def test_a_run_that_is_continued(settings: list[str], tmp_path: Path) -> None:
    """In another process, so that nothing but the files is there."""
    settings = [*settings, "objective.kl_coeff=0.5", "eval.every=1"]
    whole = train_here(settings, "name=whole")
    run = train_here(settings, "train.steps=1")
    child = command(["train", *settings, "--trust"], tmp_path)
    assert child.wait() == 0, child.err.read_text()
    assert_same_run(run, whole)
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_two_ranks_equal_one(settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, "objective.kl_coeff=0.5"]
    alone = train_here(settings, "name=alone")
    for child in (children := commands(["train", *settings, "--trust"], tmp_path, 2)):
        assert child.wait() == 0, children[0].err.read_text()
    run = tmp_path / "runs" / "run"
    base = weights(alone / "adapters" / "step-000000")
    moved = update_of(base, weights(alone / "adapter"))
    assert relative(update_of(base, weights(run / "adapter")), moved) < 1e-3
    for ours, theirs in zip(rows(run / "metrics.jsonl"), rows(alone / "metrics.jsonl"), strict=True):
        for key in ("reward", "kl", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key
