"""A reward that compares the images of a micro-batch, a user's own as the built-in one, wherever that matters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.build import build_reward
from draftplus.config import RewardConfig, load_config, trusting
from draftplus.errors import UserError
from draftplus.rewards.combined import Combined
from draftplus.rewards.custom import load_custom
from draftplus.rewards.names import REWARDS as BUILT_IN
from draftplus.rewards.names import compares_images
from draftplus.runs.plan import plan_run
from draftplus.sweeps.plan import plan_sweep
from draftplus.training.fine_tuning import micro_batch_size
from tests.support.runs import REWARDS, train_here
from tests.tiny import CPU

SOURCE = """
class Spread:
    compares_images = True
    def __init__(self, **args):
        raise ZeroDivisionError("it must not be made to see what it is")
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

def late():
    reward = lambda images, prompts: images.mean((1, 2, 3))
    reward.compares_images = True
    return reward

def early():
    return late()
early.compares_images = True

def plain(images, prompts):
    return images.mean((1, 2, 3))
"""
SPREAD = f"{REWARDS}:spread"
COMPARING = ["dissimilarity", SPREAD]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of rewards in the working directory, under a name of this test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"comparing_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"broken_{name}.py").write_text("1 / 0\n")
    return name


def test_it_is_known_before_anything_is_made(module: str) -> None:
    for name, expected in {"Spread": True, "early": True, "late": False, "plain": False, "absent": False}.items():
        assert compares_images([f"{module}:{name}"]) is expected, name
    assert compares_images([f"{module}:plain", "emoji_clip", f"{module}:early"])
    assert compares_images({"dissimilarity": RewardConfig()})
    assert not compares_images(
        [*(set(BUILT_IN) - {"dissimilarity"}), "no_reward", f"no_{module}:x", f"broken_{module}:x"]
    )
    assert not compares_images([])


def test_the_reward_says_what_its_maker_says(module: str) -> None:
    for name in (
        "emoji_clip",
        "jpeg_compressibility",
        "dissimilarity",
        SPREAD,
        f"{REWARDS}:redness",
        f"{module}:early",
    ):
        reward = build_reward(name, RewardConfig(), CPU)
        assert getattr(reward, "compares_images", False) is compares_images([name]), name


def test_one_that_says_so_too_late_is_refused(module: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{module}:late' returned a reward that compares images(.|\n)*set late\.compares_images"
    ):
        load_custom(f"{module}:late", None, {}, "cpu", None)


def test_several_compare_if_one_of_them_does() -> None:
    alone, comparing = (build_reward(f"{REWARDS}:{name}", RewardConfig(), CPU) for name in ("redness", "spread"))

    def bare(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    bare.differentiable = True  # type: ignore[attr-defined]
    assert not Combined({"alone": (alone, 1.0), "bare": (bare, 1.0)}).compares_images  # type: ignore[dict-item]
    assert Combined({"alone": (alone, 1.0), "comparing": (comparing, 0.0)}).compares_images


@pytest.mark.parametrize("name", COMPARING)
def test_the_micro_batch_shapes_the_run(settings: list[str], name: str) -> None:
    def directory(reward: str, size: int) -> Path:
        return plan_run(settings[0], ["name=null", f"reward={{{reward}: {{}}}}", f"train.micro_batch_size={size}"])[1]

    assert directory(f"{REWARDS}:redness", 4) == directory(f"{REWARDS}:redness", 2)
    assert directory(name, 4) == directory(name, 4) != directory(name, 2)


@pytest.mark.parametrize("name", COMPARING)
def test_a_run_continues_only_with_its_micro_batches(settings: list[str], name: str) -> None:
    reward = f"reward={{{name}: {{}}}}"
    train_here(settings, reward, "train.steps=1")
    with pytest.raises(UserError, match=r"was started with train\.micro_batch_size=4, but now it is 2"):
        plan_run(settings[0], [reward, "train.micro_batch_size=2"])


@pytest.mark.parametrize("name", COMPARING)
def test_a_share_must_hold_a_micro_batch(name: str) -> None:
    def of(reward: str, *more: str) -> int:
        return micro_batch_size(load_config(None, [f"reward={{{reward}: {{}}}}", *more]), 2)

    assert of(f"{REWARDS}:redness") == 4 == of(name, "train.micro_batch_size=4")
    with pytest.raises(
        UserError, match=rf"reward '{name}' compares .* 2 processes has 4; set train\.micro_batch_size=4"
    ):
        of(name)
    with pytest.raises(UserError, match=rf"reward '{name}' compares"):
        of(f"emoji_clip: {{}}, {name}")


@pytest.mark.parametrize("name", COMPARING)
def test_it_scores_no_image_by_itself(settings: list[str], tmp_path: Path, name: str) -> None:
    for asked in ({"rewards": [name]}, {"metrics": [name]}):
        with pytest.raises(UserError, match=f"'{name}' scores a training batch, not an image"):
            api.evaluate("emoji", output=tmp_path / "out", **asked)  # type: ignore[arg-type]
    run = train_here(settings, f"reward={{{REWARDS}:redness: {{}}, {name}: {{}}}}", "train.steps=1")
    told = api.evaluate(str(run), ["device=cpu", "sampler.steps=1"], images_per_prompt=2, output=tmp_path / "out")
    assert list(told["rewards"]) == [f"{REWARDS}:redness"], "what was trained beside it is measured"


def test_a_sweep_does_not_continue_a_run_with_other_micro_batches(settings: list[str], tmp_path: Path) -> None:
    recipe = Path(settings[0])
    recipe.write_text(recipe.read_text().replace(f"{REWARDS}:redness", SPREAD).replace("name: run\n", ""))
    with trusting(True):
        load_config(recipe)
    first = plan_sweep(recipe, {"train.micro_batch_size": ["2", "4"]}, "sizes", tmp_path).runs[0]
    train_here(
        settings, "train.steps=1", "train.micro_batch_size=4", f"output_dir={tmp_path / 'sizes'}", f"name={first.name}"
    )
    with pytest.raises(UserError, match=r"train\.micro_batch_size=2: .*was started with train\.micro_batch_size=4"):
        plan_sweep(recipe, {"train.micro_batch_size": ["2", "4"]}, "sizes", tmp_path)
