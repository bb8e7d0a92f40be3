"""The recipes for big models, taken by the command on tiny ones of the same classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftplus.config import load_config
from tests.families.conftest import Saved
from tests.rewards.test_clip_reward import save_random
from tests.support.processes import command
from tests.support.runs import rows

RECIPES = {  # recipe -> tiny pipeline
    "sdxl_pickscore": "sdxl",
    "sd35_pickscore": "sd3",
    "flux_pickscore": "flux_dev",
    "flux2_klein_pickscore": "flux2_klein_base",
    "qwen_image_pickscore": "qwen_image",
    "zimage_pickscore": "zimage",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe: str, saved: Saved, tmp_path: Path) -> None:
    smaller = {
        "model.path": saved(RECIPES[recipe]), "sampler.height": 96, "sampler.width": 64, "sampler.steps": 4,
        "reward.pickscore.path": save_random(tmp_path / "clip", size=32, width=32, patch=8),
        "train.steps": 2, "train.global_batch_size": 2, "eval.max_prompts": 1, "eval.images_per_prompt": 2,
        "name": "run", "device": "cpu",
    }  # fmt: skip
    child = command(["train", recipe, *(f"{key}={value}" for key, value in smaller.items())], tmp_path)
    assert child.wait() == 0, child.err.read_text()
    run, config = tmp_path / "runs" / "run", load_config(recipe)
    first, second = rows(run / "metrics.jsonl")
    assert first["grad_norm"] > 0 and second["kl"] > 0 and config.objective.kl_coeff > 0
    assert "PickScore" in (run / "report.html").read_text() or "pickscore" in (run / "report.html").read_text()
