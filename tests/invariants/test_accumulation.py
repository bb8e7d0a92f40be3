"""How a batch is cut into passes changes nothing: same gradients, same update, same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.models.stable_diffusion import StableDiffusion
from tests.support.runs import relative
from tests.support.steps import BATCH, OBJECTIVES, Updates, take_steps
from tests.tiny import randomize, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned(tiny_path: Path) -> StableDiffusion:
    made = tiny_model(tiny_path)
    randomize(made)
    return made


@pytest.fixture(scope="module")
def whole(tuned: StableDiffusion) -> dict[str, Updates]:
    """Two steps of each method in one pass."""
    return {name: take_steps(tuned, objective, BATCH, None) for name, objective in OBJECTIVES.items()}


def assert_same(ours: Updates, theirs: Updates) -> None:
    assert relative(ours.update, theirs.update) < 1e-9
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in ours.metrics.items():
        assert value == pytest.approx(theirs.metrics[name], rel=1e-9, abs=1e-15), name


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("micro", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_micro_batches_equal_the_batch(
    tuned: StableDiffusion, whole: dict[str, Updates], method: str, micro: int
) -> None:
    assert_same(take_steps(tuned, OBJECTIVES[method], micro, None), whole[method])


@pytest.mark.parametrize("sampling", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, BATCH + 1))])
@pytest.mark.parametrize("method", ["draft", "multistep", "ddpo"])
def test_the_prefix_may_be_cut_anywhere(
    tuned: StableDiffusion, whole: dict[str, Updates], method: str, sampling: int
) -> None:
    assert_same(take_steps(tuned, OBJECTIVES[method], 2, sampling), whole[method])


def test_each_image_is_scored_against_its_own_prompt(tuned: StableDiffusion, whole: dict[str, Updates]) -> None:
    assert whole["draft"].scored == whole["draft"].prompts
    cut = take_steps(tuned, OBJECTIVES["draft"], 2, 1, steps=1)
    assert cut.scored == [cut.prompts[0][:2], cut.prompts[0][2:]]
    assert len(set(cut.prompts[0])) == BATCH


def test_the_numbers_are_means_over_the_images(tuned: StableDiffusion) -> None:
    """Not over micro-batches of which the last is smaller, nor sums."""
    one = take_steps(tuned, OBJECTIVES["draft"], BATCH, None, steps=1)
    assert one.metrics["step 0 loss"] == pytest.approx(
        -one.metrics["step 0 reward"] + OBJECTIVES["draft"].kl_coeff * one.metrics["step 0 kl"], rel=1e-12
    )
    assert one.metrics["step 0 reward"] == pytest.approx(float(torch.stack(one.scores).mean()), rel=1e-12)


def test_methods_differ(whole: dict[str, Updates]) -> None:
    """Else the comparisons above would compare one thing with itself."""
    updates: list[Tensor] = [made.update for made in whole.values()]
    for i, one in enumerate(updates):
        for other in updates[:i]:
            assert relative(one, other) > 1e-3


def test_another_step_is_another_update(tuned: StableDiffusion, whole: dict[str, Updates]) -> None:
    objective = ObjectiveConfig("draft", 2, kl_coeff=0.5)
    assert relative(take_steps(tuned, objective, BATCH, None, seed=1).update, whole["draft"].update) > 1e-3
