"""Keys that were called otherwise: what runs hold is read on, what somebody writes is told the new name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from draftplus.config import (
    ADDED,
    all_keys,
    flatten,
    is_below,
    load_config,
    load_run_config,
    run_name,
    shaping_keys,
    to_dict,
    to_yaml,
    with_new_names,
)
from draftplus.config.load import RENAMED
from draftplus.errors import UserError
from draftplus.report.grouping import comparisons
from draftplus.report.read import read_run
from draftplus.runs.plan import plan_run
from draftplus.runs.weights import find_weights

TOLD = "unknown key 'model.unet'; it is now called 'model.denoiser'"


def write_run(run: Path, unet: str = "null", old: bool = True) -> Path:
    """A run that has a checkpoint, with the keys of the version before where it is `old`."""
    text = to_yaml(load_config(None, [f"name={run.name}", f"model.denoiser={unet}", f"output_dir={run.parent}"]))
    assert text.count("  denoiser: ") == 1
    (run / "checkpoints" / "step-000020").mkdir(parents=True)
    (run / "adapter").mkdir()
    (run / "config.yaml").write_text(text.replace("  denoiser: ", "  unet: ") if old else text)
    (run / "eval.jsonl").write_text(json.dumps({"step": 0, "lpips": 0.5, "reward/emoji_clip": 1.0}) + "\n")
    return run


def refused(*overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    return str(error.value)


def test_old_names_are_none_of_now() -> None:
    keys = dict(all_keys())
    assert all(new in keys and old not in keys for old, new in RENAMED.items())
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in RENAMED.items())


@pytest.mark.parametrize("override", ["model.unet=x", "model.unet=null", "model={unet: x}"])
def test_a_setting_is_told_the_new_name(tmp_path: Path, override: str) -> None:
    assert refused(override) == TOLD
    with pytest.raises(UserError, match=TOLD):
        plan_run(write_run(tmp_path / "run"), [override])


def test_a_recipe_is_told_the_new_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {unet: null}")
    (tmp_path / "child.yaml").write_text("extends: recipe.yaml")
    told = f"{tmp_path / 'recipe.yaml'}: {TOLD}"
    assert refused(recipe=tmp_path / "recipe.yaml") == refused(recipe=tmp_path / "child.yaml") == told
    # a run's file that is given as a recipe is one
    assert refused("name=again", recipe=write_run(tmp_path / "run") / "config.yaml").endswith(TOLD)


@pytest.mark.parametrize("unet", ["null", "weights.safetensors"])
def test_a_run_of_before_continues(tmp_path: Path, unet: str) -> None:
    run = write_run(tmp_path / "run", unet)
    for target in (run, load_config(None, [f"name={run.name}", f"output_dir={tmp_path}", f"model.denoiser={unet}"])):
        config, found = plan_run(target, ["train.steps=100"])
        assert found == run and config.train.steps == 100
        assert config.model.denoiser == (None if unet == "null" else unet)
    with pytest.raises(UserError, match=r"started with model\.denoiser=.*, but now it is other"):
        plan_run(run, ["model.denoiser=other"])


def test_a_run_of_before_is_evaluated(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "weights.safetensors")
    assert find_weights(str(run), ["seed=3"]).config.model.denoiser == "weights.safetensors"
    with pytest.raises(UserError, match=r"has no best\.json"):
        find_weights(f"{run}@best")


def test_a_run_of_before_is_reported_beside_one_of_now(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, "weights", old=name == "old")) for name in ("old", "new")]
    assert flatten(runs[0].config)["model.denoiser"] == "weights" and "model.unet" not in flatten(runs[0].config)
    assert list(runs[0].config["model"]) == list(runs[1].config["model"])
    (one,) = comparisons(runs)
    assert len(one.groups) == 1 and "denoiser weights" in one.title


def test_a_name_that_was_made_before_is_made_again() -> None:
    config = load_config(None, ["model.denoiser=x"])
    added = (*ADDED, "reward.emoji_clip.normalise")  # of each reward
    shaping = {key: value for key, value in shaping_keys(config, False).items() if not is_below(key, added)}
    shaping["model.unet"] = shaping.pop("model.denoiser")
    digits = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    assert run_name(config, "emoji", False) == f"emoji-{digits}"


def test_a_run_with_both_names_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  unet: null", "  unet: a\n  denoiser: b"))
    with pytest.raises(UserError, match=TOLD):
        load_run_config(run)


def test_what_has_no_old_names_stays_as_it_is() -> None:
    now = to_dict(load_config())
    assert with_new_names(now) == now
    assert with_new_names({"unet": 1, "sampler": {"unet": 2}, 3: None}) == {"unet": 1, "sampler": {"unet": 2}, 3: None}
