"""What a gain costs is what was really done for it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.config.schema import PrefixCacheConfig

bench = importlib.import_module("benchmarks.time_to_reward")
step_bench = importlib.import_module("benchmarks.step")
SMALL = ["sampler.steps=4", "train.global_batch_size=2", "train.micro_batch_size=2"]


def evaluations(*rewards: float, every: int = 10) -> list[dict[str, float]]:
    return [
        {"step": every * row, "reward": 5 + reward, "lpips": 0.4 - 0.02 * row} for row, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((0, 2), 5), ((0, 0.5, 1.5), 15), ((0, 1), 10), ((0, 0.9), None), ((0, -1, 3), 15),
        ((0, 2, 0, 2), 5), ((0,), None),
    ],
)  # fmt: skip
def test_a_gain_is_reached_where_the_line_crosses_it_first(rewards: Sequence[float], expected: float | None) -> None:
    assert bench.reached(evaluations(*rewards), 1.0) == expected


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 8])
def test_what_a_cache_saves_is_counted_as_it_comes(at: int) -> None:
    each = bench.Cost(bench.Passes(4, 1, 2), 10, PrefixCacheConfig(uses=2, batches=2), 0)
    drawn = [1, 1, 0, 0, 1, 1, 0, 0]  # two batches, each used twice, in every block of four steps
    assert each.until(at) == (4 * at + 10 * sum(drawn[:at]), at, 2 * at)
    assert each.until(at).total == sum(each.until(at))
    assert each.until(at).forwards == each.until(at).total + 2 * at
    assert each.until(at + 0.25).plain == pytest.approx(each.until(at).plain + 0.25 * (4 + 10 * [*drawn, 1][at]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.kl_steps=trajectory", "objective.kl_prefix_coeff=30"],
        ["objective.gate=0.5", "objective.kl_coeff=0.1"],
        [
            "objective.gate=0.5", "objective.method=drtune", "objective.grad_steps=2", "train.prefix_cache.uses=2",
            "train.prefix_cache.batches=1",
        ],
    ],
    ids=["trajectory", "no cache", "cache"],
)  # fmt: skip
def test_passes_are_those_of_real_steps(overrides: list[str]) -> None:
    settings = [*SMALL, "objective.kl_coeff=0", *overrides]
    setup = step_bench.Setup(settings)
    calls: list[tuple[int, bool]] = []
    setup.model.unet.conv_in.register_forward_pre_hook(
        lambda _, inputs: calls.append((len(inputs[0]), torch.is_grad_enabled()))
    )
    each = bench.cost(settings)
    for done in range(1, 4):
        setup.step()
        graded, plain = (sum(rows for rows, carries in calls if carries is which) / 4 for which in (True, False))
        expected = each.until(done)  # of one image; each pass has two images, each doubled by guidance
        assert (graded, plain) == (expected.graded, expected.plain + expected.frozen)


def test_an_arrival_lies_between_two_evaluations() -> None:
    each = bench.Cost(bench.Passes(19, 1, 0), 0, PrefixCacheConfig(), 0)
    taken = [1.0] * 10 + [2.0] * 10
    found = bench.arrival(evaluations(0, 0.5, 2.5), taken, each, 1.0)
    assert found.at == 12.5 and found.seconds == 15.0
    assert found.passes == (19 * 12.5, 12.5, 0)
    assert found.lpips == pytest.approx(100 * 0.375 / 0.4)
    at_one = bench.arrival(evaluations(0, 1.0, 2.5), taken, each, 1.0)
    assert (at_one.at, at_one.seconds) == (10, 10.0) and at_one.lpips == pytest.approx(95)
    assert bench.arrival(evaluations(0, 0.5), taken, each, 1.0) is None


def test_the_table_compares_with_the_first_method() -> None:
    def run(at: float, plain: float, seconds: float) -> Any:
        return bench.Arrival(at, bench.Passes(plain, 10, 0), seconds, 90.0)

    first = [run(20, 390, 100), run(30, 390, 300)]
    found = {"DRaFT-1": first, "gated": [run(25, 190, 80), run(25, 190, 80)], "late": [run(30, 1, 1), None]}
    lines = list(bench.lines(found, 1.0, bench.mean_passes(first)))
    assert lines == [
        "| DRaFT-1 | 1 | 20, 30 | 400 | 1.00 | 420 | 1.00 | 200 | 90 |",
        "| gated | 1 | 25, 25 | 200 | 0.50 | 220 | 0.52 | 80 | 90 |",
        "| late | 1 | 30, – | – | – | – | – | – | – |",
    ]
    assert [line.count("|") for line in lines] == [len(bench.HEAD) + 1] * 3
    alone = next(bench.lines({"gated": first}, 0.5, None))
    assert alone == "| gated | 0.5 | 20, 30 | 400 | – | 420 | – | 200 | 90 |"


def test_training_ends_once_the_gain_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on where it was."""
    limits: list[int] = []

    def train(recipe: str, overrides: list[str]) -> None:
        told = dict(override.split("=", 1) for override in overrides)
        limit = int(told["train.steps"])
        limits.append(limit)
        run = Path(told["output_dir"]) / told["name"]
        run.mkdir(exist_ok=True)
        rows = evaluations(*(0.4 * row for row in range(limit // 10 + 1)))
        for name, made in (("eval", rows), ("metrics", [{"seconds": 1.5}] * limit)):
            (run / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in made).replace("'", '"'))

    monkeypatch.setattr(bench.draftplus, "train", train)
    rows, taken = bench.train(tmp_path / "run", [], 1.0, 50)
    assert limits == [10, 20, 30] and rows[-1]["step"] == 30 and taken == [1.5] * 30
    bench.train(tmp_path / "run", [], 1.0, 50)
    assert limits == [10, 20, 30], "nothing is left to do"
    bench.train(tmp_path / "run", [], 9.0, 40)
    assert limits == [10, 20, 30, 40]
