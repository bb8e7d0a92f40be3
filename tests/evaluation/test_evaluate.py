"""`evaluate`: what it measures is what `generate` makes, made once, and compared only where it compares."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from draftplus import api
from draftplus.build import METRICS, build_metric, build_styles
from draftplus.config import trusting
from draftplus.errors import UserError
from draftplus.evaluation import latents as store
from draftplus.evaluation.generate import TUNED
from draftplus.evaluation.pictures import to_pil
from draftplus.evaluation.targets import files_hash, find_targets
from draftplus.metrics.lpips import lpips_per_prompt
from draftplus.metrics.metric import NEIGHBOURS, Seen
from draftplus.report.read import read_run
from draftplus.report.summary import reward_changes
from draftplus.rewards.clip import EMOJI_CLIP
from tests.support import rewards
from tests.support.runs import REWARDS, rows, small_settings, train_here
from tests.tiny import CPU

pytestmark = pytest.mark.slow

PROMPTS = ["a cat", "a dog"]
RED = f"{REWARDS}:redness"


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings(small, tmp_path_factory.mktemp("compared"))
    held_out = f"eval.rewards={{{REWARDS}:by_prompt: {{}}}}"
    return train_here(
        settings, "eval.every=2", "optim.lr=0.1", "model.lora.alpha=8", "eval.images_per_prompt=3", held_out
    )


@pytest.fixture(scope="module")
def other(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same but for its name."""
    settings = small_settings(small, tmp_path_factory.mktemp("other"))
    return train_here(settings, "train.steps=1", "name=other")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the sampler was asked for."""
    counts: list[int] = []
    sample = store.sampled_latents

    def counted(model: Any, jobs: Any, *rest: Any) -> Any:
        counts.append(len(jobs))
        return sample(model, jobs, *rest)

    monkeypatch.setattr(store, "sampled_latents", counted)
    return counts


def row(told: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in told["targets"] if one["label"] == label)


def pictures(directory: Path, told: dict[str, Any]) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(Image.open(directory / told["pictures"] / f)) for f in told["per_image"]["file"]])


def stopped_at(run: Path, step: int, directory: Path) -> Path:
    """The evaluations of a run up to a step, as a run of their own."""
    to = directory / f"until-{step}"
    to.mkdir(exist_ok=True)
    kept = [line for line in (run / "eval.jsonl").read_text().splitlines() if json.loads(line)["step"] <= step]
    (to / "eval.jsonl").write_text("\n".join(kept))
    return to


def test_it_repeats_the_evaluation_of_training(run: Path, tmp_path: Path) -> None:
    """By default the prompts, seeds, rewards and settings are those of the run, so the numbers are too."""
    told = api.evaluate([f"{run}@0", f"{run}@2", str(run)], output=tmp_path)
    evaluated = {one["step"]: one for one in rows(run / "eval.jsonl")}
    for label, step in (("base", 0), (f"{run.name}@0", 0), (f"{run.name}@2", 2), (run.name, 4)):
        ours, theirs = row(told, label), evaluated[step]
        for name, scores in theirs["per_image"].items():
            assert ours["per_image"][f"reward/{name}"] == pytest.approx(scores, abs=2e-3)
            assert ours["metrics"][f"reward/{name}"]["mean"] == pytest.approx(theirs[f"reward/{name}"], abs=2e-3)
        assert ours["metrics"]["lpips"]["mean"] == pytest.approx(theirs["lpips"], abs=1e-4)
        assert ours["per_prompt"]["lpips"] == pytest.approx(theirs["lpips_per_prompt"], abs=1e-4)
        if step:
            page = {change.name: change for change in reward_changes(read_run(stopped_at(run, step, tmp_path)))}
            for name in theirs["per_image"]:
                change = ours["metrics"][f"reward/{name}"]["change"]
                assert page[name].gain == pytest.approx(change["mean"], abs=4e-3)
                assert page[name].error == pytest.approx(change["standard_error"], abs=4e-3)
                assert change["standard_error"] > 0.01 or name == f"{REWARDS}:by_prompt"
    assert told == json.loads((tmp_path / "eval.json").read_text())
    assert told["seeds"] == list(range(6)) and told["sampler"]["steps"] == 3
    assert [one["step"] for one in told["targets"]] == [None, 0, 2, None]
    assert len({one["hash"] for one in told["targets"]}) == 4
    assert len({one["model_hash"] for one in told["targets"]}) == 1


def test_scores_pictures_and_changes_are_of_the_images(run: Path, tmp_path: Path) -> None:
    told = api.evaluate(
        str(run), prompts=PROMPTS, seeds=[3, 11, 5, 8], rewards=[f"{REWARDS}:brightness"], output=tmp_path
    )
    base, tuned = row(told, "base"), row(told, run.name)
    images = {"base": api.generate(str(base["target"]), PROMPTS, [3, 11, 5, 8], ["sampler.steps=3"])}
    images[run.name] = api.generate(str(run), PROMPTS, [3, 11, 5, 8])
    asked = [prompt for prompt in PROMPTS for _ in range(4)]
    for label, expected in images.items():
        ours = row(told, label)
        assert ours["per_image"]["prompt"] == asked and ours["per_image"]["seed"] == [3, 11, 5, 8] * 2 == told["seeds"]
        for name in ("redness", "by_prompt", "brightness"):
            scores = getattr(rewards, name)(expected, asked).tolist()
            assert ours["per_image"][f"reward/{REWARDS}:{name}"] == pytest.approx(scores, abs=2e-3)
        assert ours["per_prompt"]["lpips"] == pytest.approx(lpips_per_prompt(expected, asked), abs=1e-4)
        rounded = numpy.stack([numpy.asarray(to_pil(image)) for image in expected])
        assert abs(pictures(tmp_path, ours).astype(int) - rounded).max() <= 1
        assert Image.open(tmp_path / ours["pictures"] / "grid.png").size == (4 * 32 + 3 * 2, 2 * 32 + 2)
    gains = torch.tensor(tuned["per_image"][f"reward/{RED}"]) - torch.tensor(base["per_image"][f"reward/{RED}"])
    change = tuned["metrics"][f"reward/{RED}"]["change"]
    assert change["mean"] == pytest.approx(float(gains.mean()), abs=1e-4)
    assert "change" not in base["metrics"][f"reward/{RED}"]
    assert tuned["metrics"]["lpips"]["change"]["mean"] == pytest.approx(
        tuned["metrics"]["lpips"]["mean"] - base["metrics"]["lpips"]["mean"]
    )


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run and its base model, no knob turned: where, and eval.json."""
    directory = tmp_path_factory.mktemp("plain")
    return directory, api.evaluate(str(run), prompts=PROMPTS, images_per_prompt=2, output=directory)


@pytest.mark.parametrize(("knobs", "like"), [
    ({"lora_scale": 0.0}, "base"), ({"anneal": "step:1"}, "base"), ({"anneal": "step:0"}, "tuned"),
])  # fmt: skip
def test_the_ends_of_the_knobs_are_the_two_models_bit_for_bit(
    run: Path, plain: tuple[Path, dict[str, Any]], tmp_path: Path, knobs: dict[str, Any], like: str
) -> None:
    told = api.evaluate(str(run), prompts=PROMPTS, images_per_prompt=2, **knobs, output=tmp_path)
    directory, untouched = plain
    turned = told["targets"][1]
    name, value = next(iter(knobs.items()))
    assert turned["label"] == f"{run.name} {name}={str(value).removesuffix('.0')}"
    expected = untouched["targets"][like == "tuned"]
    assert turned["per_image"] == expected["per_image"], "no score differs in any bit"
    for mine, theirs in zip(latents(tmp_path, turned), latents(directory, expected), strict=True):
        assert torch.equal(mine, theirs)
    assert untouched["targets"][0]["per_image"] != untouched["targets"][1]["per_image"]


def latents(directory: Path, told: dict[str, Any]) -> list[Tensor]:
    from safetensors.torch import load_file

    files = sorted((directory / "latents" / told["hash"][:16]).glob("*.safetensors"))
    return [tensor for file in files for _, tensor in sorted(load_file(file).items())]


@pytest.mark.slow
def test_nothing_is_made_twice(run: Path, tmp_path: Path, made: list[int]) -> None:
    sized: dict[str, Any] = {"prompts": PROMPTS, "output": tmp_path}
    before = api.evaluate(str(run), images_per_prompt=2, **sized)
    assert made == [4, 4]
    again = api.evaluate(str(run), images_per_prompt=2, rewards=[f"{REWARDS}:brightness"], **sized)
    assert made == [4, 4], "another reward needs no other image"
    for old, new in zip(before["targets"], again["targets"], strict=True):
        assert old["per_image"].items() <= new["per_image"].items(), "scores do not suffer from being stored"
    api.evaluate(str(run), seeds=[0, 1, 7], **sized)
    assert made[2:] == [4, 4], "of seeds 0, 1 and 7 for two prompts, seeds 0 and 1 of the first were there"
    api.evaluate(f"{run}@4", seeds=[0, 1, 7], **sized)
    assert len(made) == 4, "the same files by another name"
    api.evaluate(str(run), ["sampler.guidance_scale=2"], images_per_prompt=2, **sized)
    assert made[4:] == [4, 4], "other settings are other images"


@pytest.mark.slow
def test_what_was_stopped_goes_on(run: Path, tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["train.sampling_batch_size=2"]
    sized: dict[str, Any] = {"prompts": PROMPTS, "images_per_prompt": 3}
    whole = api.evaluate(str(run), more, output=tmp_path / "whole", **sized)
    write, written = store._write, 0

    def stopped(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 5:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(store, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(str(run), more, output=tmp_path / "stopped", **sized)
    assert not (tmp_path / "stopped" / "eval.json").exists()
    monkeypatch.setattr(store, "_write", write)
    made.clear()
    told = api.evaluate(str(run), more, output=tmp_path / "stopped", **sized)
    assert made == [4], "the base model's six were there, and two of the other's"
    assert told == whole


def test_a_damaged_file_is_named(run: Path, tmp_path: Path) -> None:
    told = api.evaluate(str(run), prompts=PROMPTS, images_per_prompt=2, output=tmp_path)
    file = tmp_path / "latents" / told["targets"][1]["hash"][:16] / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"000000\.safetensors: damaged"):
        api.evaluate(str(run), prompts=PROMPTS, images_per_prompt=2, output=tmp_path)


@pytest.mark.slow
def test_batches_that_are_gone_are_not_written_over(run: Path, tmp_path: Path, made: list[int]) -> None:
    sized: dict[str, Any] = {"prompts": PROMPTS, "images_per_prompt": 2, "metrics": ["lpips"], "output": tmp_path}
    told = api.evaluate(str(run), ["train.sampling_batch_size=1"], **sized)
    (tmp_path / "latents" / told["targets"][0]["hash"][:16] / "000001.safetensors").unlink()
    for expected in ([4, 4, 1], [4, 4, 1]):
        assert api.evaluate(str(run), ["train.sampling_batch_size=1"], **sized) == told
        assert made == expected


def test_several_targets_share_one_base(run: Path, other: Path, small: Path, tmp_path: Path, made: list[int]) -> None:
    sized: dict[str, Any] = {"prompts": PROMPTS, "images_per_prompt": 2}
    told = api.evaluate([str(run), f"{run}@2", str(other), str(run)], **sized, output=tmp_path / "a")
    assert [one["label"] for one in told["targets"]] == ["base", run.name, f"{run.name}@2", "other"]
    assert made == [4] * 4
    named = api.evaluate([str(run), str(small)], **sized, output=tmp_path / "b")
    assert [one["target"] for one in named["targets"]] == [str(small), str(run)], "a model that is named is the base"
    assert named["targets"][0]["per_image"] == told["targets"][0]["per_image"]
    alone = api.evaluate(str(small), ["sampler.steps=3"], metrics=["lpips"], **sized, output=tmp_path / "c")
    assert len(alone["targets"]) == 1 and alone["targets"][0]["metrics"].keys() == {"lpips"}


def test_adapters_are_targets(run: Path, tmp_path: Path) -> None:
    """By themselves, and as a part of a run, whose settings they are sampled with."""
    moved = tmp_path / "mine"
    shutil.copytree(run / "adapters" / "step-000002", moved)
    names = [f"{run}@2", str(run / "adapters" / "step-000002"), str(moved)]
    told = api.evaluate(names, prompts=PROMPTS, images_per_prompt=2, output=tmp_path / "out")
    assert [one["label"] for one in told["targets"]] == ["base", f"{run.name}@2", f"{run.name}/step-000002", "mine"]
    assert [one["step"] for one in told["targets"]] == [None, 2, 2, None]
    assert len({one["hash"] for one in told["targets"][1:]}) == 1


def test_every_metric(run: Path, tmp_path: Path) -> None:
    n = NEIGHBOURS + 2
    told = api.evaluate(
        str(run), prompts=PROMPTS, images_per_prompt=n, metrics=[*METRICS, f"{REWARDS}:brightness"],
        features=str(EMOJI_CLIP), output=tmp_path,
    )  # fmt: skip
    base, tuned = told["targets"]
    for metrics in (base["metrics"], tuned["metrics"]):
        assert metrics.keys() - {key for key in metrics if key.startswith("reward/")} == METRICS.keys()
        assert f"reward/{REWARDS}:brightness" in metrics
        for number in metrics.values():
            assert number["images"] == 2 * n
            assert number["interval"][0] <= number["mean"] <= number["interval"][1]
    assert [base["metrics"][name]["mean"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert base["metrics"]["drift"]["mean"] < 1e-6 < tuned["metrics"]["drift"]["mean"]
    assert 1 <= tuned["metrics"]["style_count"]["mean"] <= 7


@pytest.mark.parametrize("name", ["style_entropy", "style_count", "style_divergence"])
def test_intervals_of_styles_hold_what_other_images_give(name: str) -> None:
    """Of as many images: these statistics depend on their number, so a second bootstrap on top would lie below."""
    generator = torch.Generator().manual_seed(0)
    metric = build_metric(name)

    def images() -> Tensor:
        return (2 * torch.randn(12, 7, generator=generator)).softmax(1)

    expected = torch.tensor([metric.estimate([Seen(styles=images())], False).mean for _ in range(200)]).mean()
    told = [metric.estimate([Seen(styles=images()) for _ in range(4)], False).interval for _ in range(60)]
    assert sum(one is not None and one[0] <= expected <= one[1] for one in told) >= 50
    assert metric.estimate([Seen(styles=images()[:2])], False).interval is None


@pytest.mark.parametrize("name", ["vendi", "precision", "recall", "coverage", "drift"])
def test_features_that_are_not_finite_make_no_number(name: str) -> None:
    good = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    told = build_metric(name).estimate([Seen(features=torch.full((8, 4), torch.nan), base=good)], False)
    assert math.isnan(told.mean) and told.interval is None and told.images == 8


def test_a_linked_part_of_a_model_counts_in_its_hash(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"unet-{name}").mkdir()
        (tmp_path / f"unet-{name}" / "weights").write_text(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet").symlink_to(tmp_path / f"unet-{name}")
        (tmp_path / name / "again").symlink_to(tmp_path / name)  # a cycle is not followed
    assert files_hash(tmp_path / "a") != files_hash(tmp_path / "b")


def test_styles_are_told_apart() -> None:
    """Probabilities of the embedded CLIP; each image's own, whatever is beside it."""
    from draftplus.metrics.styles import STYLES

    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    styles = build_styles(CPU)
    together = styles(images, "a cat")
    assert together.shape == (3, len(STYLES))
    torch.testing.assert_close(together.sum(1), torch.ones(3))
    torch.testing.assert_close(together[1:2], styles(images[1:2], "a cat"))
    assert not torch.allclose(together, styles(images, "a dog"))


@pytest.mark.parametrize(
    ("targets", "settings", "options", "says"),
    [
        ("{run}", [], {"metrics": ["lpisp"]}, r"metric 'lpisp'.*did you mean 'lpips'"),
        ("{run}", [], {"metrics": ["emoji_clap"]}, "did you mean 'emoji_clip'"),
        ("{run}", [], {"rewards": ["emoji_clap"]}, "did you mean 'emoji_clip'"),
        ("{run}", [], {"images_per_prompt": 1}, "'lpips' needs at least 2 images of each prompt, got 1"),
        ("{run}", [], {"metrics": ["coverage"], "images_per_prompt": 5}, "at least 6 images"),
        ("{run}", [], {"images_per_prompt": 0}, "images per prompt is 0; give at least 1"),
        ("{run}", [], {"images_per_prompt": 3, "seeds": [1, 2]}, "but 2 seeds are given"),
        ("{run}", [], {"seeds": [2, 2]}, "each once"),
        ("{run}", [], {"prompts": []}, "no prompt"),
        ("{run}", [], {"anneal": "cubic"}, "anneal 'cubic'"),
        ("{run}", [], {"lora_scale": float("nan")}, "lora_scale is nan"),
        ("{run}@3", [], {}, "no adapter of step 3; its steps are 0, 2, 4"),
        ("{run}@last", [], {}, "a step or best"),
        ("runs/gone", [], {}, "runs/gone"),
        ("emojy", [], {}, "did you mean 'emoji'"),
        ("{small}", [], {"lora_scale": 0.5}, "no trained weights"),
        ("{run} {emoji}", [], {}, "different base models"),
        ("{run} {other}", [], {}, "different held-out prompts"),
        ("{run}", ["sampler.stepz=3"], {}, "did you mean 'sampler.steps'"),
        ("{run}", [], {"metrics": ["vendi"], "features": "/no/such/clip"}, "no/such/clip"),
    ],
)  # fmt: skip
def test_what_is_refused(
    run: Path, other: Path, small: Path, tmp_path: Path, made: list[int], targets: str, settings: list[str],
    options: dict[str, Any], says: str,
) -> None:  # fmt: skip
    """In one line, and before any image is made."""
    names = targets.format(run=run, other=other, small=small, emoji="emoji").split()
    if "held-out" in says:
        config = other / "config.yaml"
        before = config.read_text()
        config.write_text(before.replace("max_prompts: 4", "max_prompts: 1"))
    try:
        with pytest.raises(UserError, match=says):
            api.evaluate(names, settings, output=tmp_path / "out", **options)
    finally:
        if "held-out" in says:
            config.write_text(before)
    assert not made and not (tmp_path / "out" / "eval.json").exists()


def test_other_rewards_of_one_name(run: Path, other: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(other, tmp_path / "copy")  # to trust the edited one would be to trust the other no longer
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("args: {}", "args: {gain: 2}"))
    with pytest.raises(UserError, match=rf"different settings for reward '{RED}'"):
        api.evaluate([str(run), str(copy)], prompts=PROMPTS, output=tmp_path, trust=True)


def test_other_sampler_settings_are_named(run: Path, other: Path, tmp_path: Path) -> None:
    config = other / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("guidance_scale: 7.5", "guidance_scale: 2.0"))
    try:
        with pytest.raises(UserError, match=r"sampler\.guidance_scale=7\.5.*with 2\.0"):
            api.evaluate([str(run), str(other)], output=tmp_path)
        told = api.evaluate(
            [str(run), str(other)], ["sampler.guidance_scale=3"], prompts=PROMPTS, images_per_prompt=2, output=tmp_path
        )
    finally:
        config.write_text(before)
    assert told["sampler"]["guidance_scale"] == 3


def test_runs_that_decode_in_tiles_are_others(run: Path, tmp_path: Path) -> None:
    """Their pictures differ, so their images are told apart and their numbers not compared."""
    ours, tiled = (find_targets([str(run)], more, TUNED)[1].hash for more in ([], ["model.vae_tiling=true"]))
    assert ours != tiled
    other = Path(shutil.copytree(run, tmp_path / "other"))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("vae_tiling: false", "vae_tiling: true"))
    with trusting(True), pytest.raises(UserError, match=r"different base models \(.* and .* in float32, tiled\)"):
        find_targets([str(run), str(other)], [], TUNED)
