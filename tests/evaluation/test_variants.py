"""`eval.variants`: other ways to sample the result, on the evaluation set, in the last row of eval.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.errors import UserError
from draftplus.evaluation import variants
from tests.support.runs import REWARDS, rows, small_settings, train_here, weights

pytestmark = pytest.mark.slow

EVERY = ["eval.every=2", "optim.lr=0.1", "model.lora.alpha=8", f"eval.rewards={{{REWARDS}:by_prompt: {{}}}}"]
ALL = "{lora_scale: 0}, {lora_scale: 0.5}, {anneal: 'power:2'}, {anneal: 'step:0'}, {checkpoint: 2}"


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings(small, tmp_path_factory.mktemp("varied"))
    return train_here(settings, *EVERY, f"eval.variants=[{ALL}]")


def test_they_stand_in_the_last_row(run: Path) -> None:
    first, middle, last = rows(run / "eval.jsonl")
    assert "variants" not in first and "variants" not in middle
    labels = ["lora_scale=0", "lora_scale=0.5", "anneal=power:2", "anneal=step:0", "checkpoint=2"]
    assert [one["label"] for one in last["variants"]] == labels
    by_label = {one["label"]: one for one in last["variants"]}
    assert by_label["lora_scale=0.5"]["lora_scale"] == 0.5 and by_label["anneal=power:2"]["anneal"] == "power:2"
    told = ("reward", f"reward/{REWARDS}:redness", f"reward/{REWARDS}:by_prompt", "lpips", "images", "per_image")
    for label, row in (("lora_scale=0", first), ("anneal=step:0", last), ("checkpoint=2", middle)):
        assert {key: by_label[label][key] for key in told} == {key: row[key] for key in told}, "bit for bit"
    rewards = [row["reward"] for row in (first, middle, last, by_label["lora_scale=0.5"], by_label["anneal=power:2"])]
    assert len(set(rewards)) == 5


def test_they_are_what_evaluate_says(run: Path, tmp_path: Path) -> None:
    last = {one["label"]: one for one in rows(run / "eval.jsonl")[-1]["variants"]}
    for knob, label in (({"lora_scale": 0.5}, "lora_scale=0.5"), ({"anneal": "power:2"}, "anneal=power:2")):
        told = api.evaluate(str(run), output=tmp_path, **knob)["targets"][1]  # type: ignore[arg-type]
        for name, scores in last[label]["per_image"].items():
            assert told["per_image"][f"reward/{name}"] == pytest.approx(scores, abs=2e-3)


def test_their_pictures_are_saved(run: Path) -> None:
    step = run / "samples" / "step-000004"
    for name in ("lora_scale=0.5", "anneal=power-2"):
        assert len(list((step / name).glob("*.png"))) == 2 * 2 + 1
    whole = (step / "grid.png").read_bytes()
    assert (
        (step / "anneal=step-0" / "grid.png").read_bytes()
        == whole
        != (step / "lora_scale=0.5" / "grid.png").read_bytes()
    )


@pytest.mark.slow
def test_a_finished_run_gets_more_of_them(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are there are kept; those of a set that changed meanwhile are refused."""
    run = train_here(settings, *EVERY)
    before, trained = rows(run / "eval.jsonl"), weights(run / "adapter")
    train_here(settings, *EVERY, "eval.variants=[{lora_scale: 0.5}]")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(run / "adapter").items())
    half = rows(run / "eval.jsonl")[-1]["variants"]
    calls = []
    measure = variants.measure
    monkeypatch.setattr(variants, "measure", lambda *a: calls.append(a[-1].label) or measure(*a))
    train_here(settings, *EVERY, "eval.variants=[{anneal: linear}, {lora_scale: 0.5}]")
    assert calls == ["anneal=linear"]
    after = rows(run / "eval.jsonl")
    assert after[-1].pop("variants")[1:] == half and after == before
    with pytest.raises(UserError, match="other prompts, images or rewards"):
        train_here(settings, *EVERY, "eval.images_per_prompt=3", "eval.variants=[{lora_scale: 0.2}]")
    with pytest.raises(UserError, match="step 1 was not evaluated; the evaluated steps of this run are 0, 2, 4"):
        train_here(settings, *EVERY, "eval.every=1", "eval.variants=[{checkpoint: 1}]")


def test_a_schedule_that_is_none_is_refused_before_anything_is_loaded(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match=r"eval\.variants: anneal 'cubic'"):
        train_here(settings, "eval.variants=[{anneal: cubic}]", f"model.path={tmp_path}")
