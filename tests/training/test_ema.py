"""The averaged weights: what they are, where they are used, and that training goes on with the raw ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.build import build_model
from draftplus.data.prompts import load_prompts
from draftplus.evaluation.held_out_set import evaluation_set
from draftplus.training.optim import Ema
from tests.support.rewards import redness
from tests.support.runs import configure, rows, small_settings, train_here, weights
from tests.tiny import CPU

pytestmark = pytest.mark.slow

DECAY = 0.3  # above the warm-up's first two values, 0.1 and 2/11, and below those after the fourth


@pytest.fixture(scope="module")
def here(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    settings = small_settings(small, tmp_path_factory.mktemp("ema"))
    return [*settings, "train.steps=6", "eval.every=3", "checkpoint.every=1", "checkpoint.keep=100"]


@pytest.fixture(scope="module")
def averaged(here: list[str]) -> Path:
    return train_here(here, "name=averaged", f"optim.ema={DECAY}")


@pytest.fixture(scope="module")
def plain(here: list[str]) -> Path:
    return train_here(here, "name=plain")


def of_step(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    found = weights(run / "checkpoints" / f"step-{step:06d}")
    return {name.split("/", 1)[1]: tensor for name, tensor in found.items() if name.startswith(file)}


def test_it_is_the_formula(here: list[str], averaged: Path) -> None:
    """s <- d s + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), from the raw weights of every step."""
    start = build_model(configure(here).model, CPU).tuned.trainable()
    average = {name: parameter.detach().double() for name, parameter in start.items()}
    for n in range(6):
        decay = min(DECAY, (1 + n) / (10 + n))
        raw, kept = of_step(averaged, n + 1, "weights"), of_step(averaged, n + 1, "ema")
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * raw[name].double()
            torch.testing.assert_close(kept[name].double(), average[name], rtol=1e-5, atol=1e-7)
    assert any((kept[name] - raw[name]).abs().max() > 1e-3 for name in raw), "too close to tell one from the other"


def test_raw_weights_continue_training(averaged: Path, plain: Path) -> None:
    assert rows(averaged / "metrics.jsonl") == rows(plain / "metrics.jsonl")
    for step in range(1, 7):
        ours, theirs = of_step(averaged, step, "weights"), of_step(plain, step, "weights")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("directory", "step"), [("adapter", 6), ("adapters/step-000003", 3)])
def test_it_is_what_is_exported(averaged: Path, plain: Path, directory: str, step: int) -> None:
    exported = weights(averaged / directory)
    kept = of_step(averaged, step, "ema")
    for name, tensor in kept.items():
        found = exported["pytorch_lora_weights.safetensors/unet." + name.replace(".default.", ".")]
        torch.testing.assert_close(found, tensor * (2.0 if "lora_B" in name else 1.0))  # alpha / rank
    raw = weights(plain / directory)
    assert any((exported[name] - raw[name]).abs().max() > 1e-3 for name in raw)


def test_it_is_what_is_evaluated(here: list[str], averaged: Path, plain: Path) -> None:
    config = configure(here)
    which = evaluation_set(config, load_prompts(config.data.prompts))
    for run in (averaged, plain):
        found = rows(run / "eval.jsonl")[-1]["per_image"]["tests.support.rewards:redness"]
        expected = []
        for number, prompt in enumerate(which.prompts):
            seeds = range(number * which.images_per_prompt, (number + 1) * which.images_per_prompt)
            images = api.generate(str(run), [prompt], seeds)
            expected += redness(images, [prompt] * len(images)).tolist()
        assert found == pytest.approx(expected, abs=1e-3)
    ours, theirs = (rows(run / "eval.jsonl")[-1]["reward"] for run in (averaged, plain))
    assert abs(ours - theirs) > 1e-2, "too close to tell one from the other"


def test_weights_are_bit_identical_afterwards() -> None:
    parameters = {"w": torch.nn.Parameter(torch.randn(7))}
    ema = Ema(parameters, 0.5)
    parameters["w"].data += 1
    before = parameters["w"].detach().clone()
    with pytest.raises(ZeroDivisionError), ema.applied(parameters):
        assert not torch.equal(parameters["w"], before)
        raise ZeroDivisionError
    assert torch.equal(parameters["w"], before)
    ema.update(parameters)
    assert torch.equal(parameters["w"], before), "the average shares memory with the weights"
