"""Rewards in units of their deviation over the base model's pictures."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.build import build_model, build_rewards, weighted_sum
from draftplus.config import Config, flatten, load_config, run_name, to_dict
from draftplus.data.prompts import load_prompts
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.evaluation import scale as scaling
from draftplus.evaluation.generate import generate_images
from draftplus.evaluation.scale import base_jobs, measured_scales, read_scales
from draftplus.rewards.combined import Scale
from draftplus.runs.directory import SCALES
from draftplus.runs.origin import differences
from draftplus.runs.plan import plan_run
from draftplus.types import Model
from tests.support.processes import commands
from tests.support.runs import REWARDS, configure, fingerprint, relative, rows, train_here, update_of, weights
from tests.tiny import CPU, randomize

BASE = {"normalise": "base"}
PICTURES = 20  # instead of 64; 18 prompts are trained on


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PICTURES", PICTURES)


pytestmark = pytest.mark.usefixtures("few")


def settled_with(settings: list[str], *more: str) -> Config:
    return plan_run(configure([*settings, *more]), [])[0]


def rewards(**settings: Mapping[str, Any]) -> str:
    """The override that trains on these rewards of `tests.support.rewards`."""
    return f"reward={json.dumps({f'{REWARDS}:{name}': one for name, one in settings.items()})}"


def scales_of(run: Path) -> dict[str, Scale]:
    told = json.loads((run / SCALES).read_text())
    assert told["pictures"] == scaling.PICTURES
    return {name: Scale(**one) for name, one in told["rewards"].items()}


def measured(config: Config, model: Model, here: World | None = None) -> dict[str, Scale]:
    found = build_rewards(config.reward, CPU)
    jobs = base_jobs(config, load_prompts(config.data.prompts).train)
    return measured_scales(model, found, config, jobs, here or World(0, 1, CPU))


@pytest.mark.parametrize("lora", ["model.lora.rank=2", "model.lora=null"])
def test_it_is_the_base_models_pictures(settings: list[str], lora: str) -> None:
    """With the adapters off, or by the frozen copy: what was trained since does not matter."""
    config = settled_with(settings, rewards(by_prompt=BASE), lora)
    model = build_model(config.model, CPU, trainable=True)
    jobs = base_jobs(config, load_prompts(config.data.prompts).train)
    assert len(jobs) == PICTURES and {job.prompt for job in jobs} == set(load_prompts(config.data.prompts).train)
    assert len({job.seed for job in jobs}) == PICTURES
    images = generate_images(build_model(config.model, CPU, trainable=False), jobs, config.sampler)
    (reward,) = build_rewards(config.reward, CPU).values()
    scores = reward(images, [job.prompt for job in jobs]).tolist()
    randomize(model)  # type: ignore[arg-type]
    (scale,) = measured(config, model).values()
    assert scale.mean == pytest.approx(statistics.fmean(scores), rel=1e-6)
    assert scale.deviation == pytest.approx(statistics.pstdev(scores), rel=1e-6)


def test_neither_seed_nor_unit_matters(settings: list[str]) -> None:
    """So that runs of several seeds optimise one and the same sum."""
    units: dict[int, dict[str, float]] = {0: {}, 5: {"gain": 100.0, "offset": 3.0}}  # by the seed
    configs = [
        settled_with(settings, rewards(affine={**BASE, "args": args}), f"seed={seed}") for seed, args in units.items()
    ]
    model = build_model(configs[0].model, CPU, trainable=False)
    (one,), (other,) = (measured(config, model).values() for config in configs)
    assert other.mean == pytest.approx(100 * one.mean + 3, rel=1e-6)
    assert other.deviation == pytest.approx(100 * one.deviation, rel=1e-6)


@dataclass(frozen=True)
class Pretended(World):
    """One of several processes, which go one after the other. said: what each gave when it was last its turn."""

    said: dict[int, Any] = field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        return list(self.said.values())


@pytest.mark.parametrize("size", [2, 3])  # which share the pictures evenly, and not so
def test_processes_share_the_pictures(settings: list[str], size: int) -> None:
    config = settled_with(settings, rewards(by_prompt=BASE, redness=BASE))
    model = build_model(config.model, CPU, trainable=False)
    said: dict[int, Any] = {}
    together = [measured(config, model, Pretended(rank, size, CPU, said=said)) for rank in (*range(size), 0)]
    assert together[-1] == together[-2], "each of them knows the same"
    parts = [set(part[f"{REWARDS}:redness"]) for part in said.values()]
    assert set.union(*parts) == set(range(PICTURES)) and len({*map(len, parts)}) == 1
    for name, scale in measured(config, model).items():
        assert together[-1][name] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("method", ["draft", "ddpo"])
def test_what_is_logged(settings: list[str], method: str) -> None:
    """`reward` is the sum that is optimised, in deviations, and reward/<name> as the reward gave it."""
    given = rewards(affine={"weight": 2.0, **BASE}, by_prompt={"weight": 0.5})
    run = train_here([*settings, given, f"objective.method={method}", "sampler.steps=4", "train.steps=2"])
    (scale,) = scales_of(run).values()
    for row in [*rows(run / "metrics.jsonl"), *rows(run / "eval.jsonl")]:
        raw, other = row[f"reward/{REWARDS}:affine"], row[f"reward/{REWARDS}:by_prompt"]
        expected = 2 * (raw - scale.mean) / scale.deviation + 0.5 * other
        assert row["reward"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert "2 x tests.support.rewards:affine (normalised) + 0.5 x" in (run / "best.json").read_text()


@pytest.mark.parametrize("method", ["draft", "refl", "ddpo"])
def test_a_rewards_unit_no_longer_matters(settings: list[str], method: str) -> None:
    """Training by r equals training by 100 r + 3, beside another reward."""
    common = [*settings, f"objective.method={method}", "sampler.steps=4", "train.steps=2"]
    units: dict[str, dict[str, float]] = {"one": {}, "other": {"gain": 100.0, "offset": 3.0}}
    one, other = (
        train_here([*common, f"name={name}", rewards(affine={**BASE, "args": args}, by_prompt=BASE)])
        for name, args in units.items()
    )
    before = weights(one / "adapters" / "step-000000")
    moved = [update_of(before, weights(run / "adapter")) for run in (one, other)]
    assert relative(*moved) < 1e-3  # Adam divides by gradients that are close to 0
    for row, same in zip(rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl"), strict=True):
        assert same["reward"] == pytest.approx(row["reward"], rel=1e-4, abs=1e-4)


def test_the_unit_mattered_without(settings: list[str]) -> None:
    """The other reward is then hardly followed, which the test above would otherwise not show."""
    runs = [
        train_here([*settings, "train.steps=2", f"name={name}", rewards(affine={"args": {"gain": gain}}, by_prompt={})])
        for name, gain in {"one": 1.0, "other": 100.0}.items()
    ]
    before = weights(runs[0] / "adapters" / "step-000000")
    assert relative(*(update_of(before, weights(run / "adapter")) for run in runs)) > 0.1


@pytest.mark.slow
def test_resumed_equals_uninterrupted(settings: list[str], tmp_path: Path) -> None:
    """By the scales that the run has kept; where they are lost, they are measured again."""
    settings = [*settings, rewards(affine=BASE, by_prompt=BASE)]
    whole, half = train_here(settings, "name=whole"), train_here(settings, "train.steps=2", "name=half")
    for name in ("kept", "lost", "other"):
        run = tmp_path / "runs" / name
        shutil.copytree(half, run)
        if name == "lost":
            (run / SCALES).unlink()
        if name == "other":
            told = json.loads((run / SCALES).read_text())
            told["rewards"][f"{REWARDS}:affine"]["deviation"] *= 100
            (run / SCALES).write_text(json.dumps(told))
        train_here(settings, f"name={name}")
        assert (fingerprint(run) == fingerprint(whole)) == (name != "other"), name
        assert (scales_of(run) == scales_of(whole)) == (name != "other"), name


@pytest.mark.slow
def test_two_ranks_equal_one(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PICTURES", 64)  # as in the other processes
    settings = [*settings, rewards(affine=BASE, by_prompt=BASE), "train.micro_batch_size=2", "train.steps=2"]
    alone = train_here(settings, "name=alone")
    children = commands(["train", *settings, "name=two"], tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0]
    two = tmp_path / "runs" / "two"
    for name, scale in scales_of(alone).items():
        assert scales_of(two)[name] == pytest.approx(scale, rel=1e-6)
    before = weights(alone / "adapters" / "step-000000")
    assert relative(*(update_of(before, weights(run / "adapter")) for run in (two, alone))) < 1e-3


def test_what_is_refused(settings: list[str], tmp_path: Path) -> None:
    for given, words in (
        (rewards(constant=BASE), rf"{REWARDS}:constant\.normalise is base, but .* is always 0\.5.* remove normalise"),
        (rewards(constant={**BASE, "args": {"value": float("inf")}}).replace("Infinity", ".inf"), "not always finite"),
        (rewards(spread=BASE), r"spread\.normalise is base, but this reward compares the images"),
    ):
        with pytest.raises(UserError, match=words):
            train_here([*settings, given])
        assert not (tmp_path / "runs" / "run").exists(), "nothing is left of a run that did not start"
    with pytest.raises(UserError, match=r"normalise is 'std'; choose one of: base"):
        load_config(None, ["reward.emoji_clip.normalise=std"])
    with pytest.raises(UserError, match=r"eval\.rewards\.clip_score\.normalise is base, but held-out rewards are not"):
        load_config(None, ["eval.rewards.clip_score.normalise=base"])


def test_a_damaged_file_is_refused(settings: list[str], tmp_path: Path) -> None:
    config, name = configure([*settings, rewards(affine=BASE)]), f"{REWARDS}:affine"
    assert read_scales(tmp_path, config) is None
    for text in ("{", '{"rewards": 3}', json.dumps({"rewards": {name: {"mean": 1, "deviation": 0}}})):
        (tmp_path / SCALES).write_text(text)
        with pytest.raises(UserError, match=r"reward_scales\.json is damaged"):
            read_scales(tmp_path, config)
    (tmp_path / SCALES).write_text(json.dumps({"rewards": {"another": {"mean": 1, "deviation": 2}}}))
    assert read_scales(tmp_path, config) is None


def test_without_it_nothing_changes(settings: list[str]) -> None:
    """Neither the name of a run, nor a file, nor whether a run of an earlier version goes on; with it, all do."""
    plain, scaled = (
        load_config(None, ["reward=pickscore", f"reward.pickscore.normalise={to}"]) for to in ("null", "base")
    )
    assert run_name(plain, "emoji", False) == run_name(load_config(None, ["reward=pickscore"]), "emoji", False)
    assert run_name(plain, "emoji", False) != run_name(scaled, "emoji", False)
    assert not (train_here(settings, "train.steps=1") / SCALES).exists()
    earlier = {key: value for key, value in flatten(to_dict(plain)).items() if not key.endswith(".normalise")}
    assert differences(earlier, flatten(to_dict(plain))) == {}
    assert differences(earlier, flatten(to_dict(scaled))) == {"reward.pickscore.normalise": (None, "base")}


def test_the_gradient_is_that_of_the_scaled_sum() -> None:
    config = load_config(None, [rewards(redness={"weight": 3.0, **BASE}, brightness={})])
    found = build_rewards(config.reward, CPU)
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    total = weighted_sum(config, found, {f"{REWARDS}:redness": Scale(7.0, 20.0)})(images, ["a"] * 4).total
    by_hand = 3 * (found[f"{REWARDS}:redness"](images, []) - 7) / 20 + found[f"{REWARDS}:brightness"](images, [])
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(one.sum(), images)[0] for one in (total, by_hand)))
