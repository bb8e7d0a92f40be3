"""The statistics of benchmarks/results.py on numbers whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from draftplus.report.inputs import read_inputs
from draftplus.sweeps.plan import plan_sweep
from tests.report.synthetic import PROMPTS, write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_results", BENCHMARKS / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def one(script: ModuleType, reward: float, lpips: float) -> object:
    return script.Measured("", np.full((3, 4), reward), np.full((3, 4), lpips))


def test_diversity_is_interpolated_between_points_and_the_best_of_several_places(script: ModuleType) -> None:
    base, whole = one(script, 10, 0.4), script.Draw(np.ones(3), np.ones(4))
    curve = script.Curve("", [one(script, 12, 0.3), one(script, 11, 0.1)])  # goes on past its best
    at = [script.diversity_at(curve, gain, base, whole) for gain in (0, 1, 1.5, 2, 2.1)]
    assert at[:4] == pytest.approx([0.4, 0.35, 0.325, 0.3]) and at[4] is None


def test_intervals_hold_the_truth_as_often_as_they_say(script: ModuleType) -> None:
    generator = np.random.default_rng(1)
    held, rounds = 0, 60
    drawn = script.draws(8, 12)[:800]
    for _ in range(rounds):
        values = generator.normal(0, 1, (8, 1)) + generator.normal(0, 1, (1, 12)) + generator.normal(0, 0.5, (8, 12))
        low, high = np.quantile([draw.mean(values) for draw in drawn[1:]], [0.025, 0.975])
        held += low <= 0 <= high
    assert 0.85 * rounds <= held <= rounds


def test_what_is_constant_has_no_spread(script: ModuleType) -> None:
    values = np.full((3, 4), 2.0)
    assert script.estimate(lambda draw: draw.mean(values), script.draws(3, 4)) == "+2.00 (+2.00 to +2.00)"
    assert script.estimate(lambda draw: None, script.draws(3, 4)) == "–"


def test_tables_of_runs(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        for number, kl in enumerate((0, 1, 10)):
            settings = {"seed": seed, "objective.kl_coeff": kl}
            write_run(
                tmp_path / f"{number}-{seed}", settings, every=10, pictures=False, variants=kl == 0,
                rewards=("emoji_clip", "jpeg_compressibility"),
            )  # fmt: skip
    write_run(tmp_path / "9-0", {"objective.grad_steps": 2}, pictures=False)
    made = script.study(read_inputs([tmp_path]).runs, "emoji_clip")
    assert "left out: DRaFT-2 has 1 of 2 seeds" in capsys.readouterr().out
    assert made.seeds == 2 and len(made.prompts) == len(PROMPTS)
    drawn = script.draws(2, len(PROMPTS))[:50]
    script.finals_table(made, drawn, "jpeg_compressibility")
    script.coefficient_table(made, drawn)
    script.equal_reward_table(made, drawn)
    script.against_draft_table(made, drawn, "emoji_clip")
    told = capsys.readouterr().out
    assert "| DRaFT+, β = 10 | +" in told and "| DRaFT-1, stopped early: step 10 | +" in told
    assert "DRaFT-1 → DRaFT+, β = 1 | +" in told and "| 2 of 2 |" in told  # the law of the synthetic runs
    assert "nan" not in told


@pytest.mark.parametrize("name", ["results", "results_ddpo", "results_jpeg"])
def test_its_sweeps_are_valid(name: str, tmp_path: Path) -> None:
    assert plan_sweep(BENCHMARKS / f"{name}.yaml", {}, parent=tmp_path).runs
