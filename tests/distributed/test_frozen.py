"""A reward and a decoder in parts on several processes train and measure a model as whole ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.rewards.clip import EMOJI_CLIP
from tests.distributed.test_sharding import run_on
from tests.distributed.test_two_ranks import assert_nearly_equal
from tests.support.frozen import work_alone, work_in_parts
from tests.support.processes import ranks
from tests.support.runs import relative, train_here

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize(
    ("size", "within", "full", "methods"),
    [
        (2, None, False, ["draft_lv"]),
        (4, None, False, ["ddpo"]),
        (4, 2, True, ["refl"]),
    ],
    ids=["two", "four", "hybrid"],
)
def test_parts_equal_the_whole(
    small: Path, tmp_path: Path, size: int, within: int | None, full: bool, methods: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    alone = work_alone(str(small), full, methods)
    children = ranks(work_in_parts, [str(small), full, methods, within], tmp_path, size)
    assert [child.wait() for child in children] == [0] * size, children[0].err.read_text()
    results: list[dict[str, Any]] = [torch.load(tmp_path / f"rank{rank}" / "worked.pt") for rank in range(size)]
    for method in methods:
        expected = alone["made"][method]
        scores = torch.stack(sorted(expected["scores"]))
        for result in results:
            made = result["made"][method]
            assert relative(made["update"], expected["update"]) < 1e-9, method
            for name, value in made["metrics"].items():
                assert value == pytest.approx(expected["metrics"][name], rel=1e-9, abs=1e-14), (method, name)
        found = torch.stack(sorted(one for result in results for one in result["made"][method]["scores"]))
        torch.testing.assert_close(found, scores, rtol=1e-9, atol=1e-12)
    for result in results:
        for name, numbers in result["held"].items():
            assert 0 < numbers <= 1.1 * alone["held"][name] / (within or size), name
        for name, scored in result["evaluated"]["per_image"].items():  # which are told in float32
            assert scored == pytest.approx(alone["evaluated"]["per_image"][name], rel=1e-6), name
        for name in ("reward", "lpips", "images"):
            assert result["evaluated"][name] == pytest.approx(alone["evaluated"][name], rel=1e-6), name


def test_a_run_on_four_two_and_one(settings: list[str], tmp_path: Path) -> None:
    """With a scale that is measured, a reward that is held out, and fewer prompts to evaluate than processes."""
    settings = [
        *settings, "reward={emoji_clip: {normalise: base}}", f"eval.rewards={{clip: {{path: {EMOJI_CLIP}}}}}",
        "eval.every=1", "train.micro_batch_size=1",
    ]  # fmt: skip
    alone = train_here(settings, "name=alone")
    shared = ["parallel.mode=shard", "parallel.shard_frozen_above=0"]
    run_on(4, [*settings, *shared, "train.steps=2"], tmp_path / "four")
    run_on(2, [*settings, *shared, "train.steps=3"], tmp_path / "two")
    train_here(settings)
    assert_nearly_equal(tmp_path / "runs" / "run", alone)
