"""Evaluation: other prompts and other noise than training's, the same before and after, and what is written of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from draftplus import api, rng
from draftplus.data.prompts import load_prompts, normalized
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.evaluation.held_out import score_images
from draftplus.evaluation.held_out_set import EvaluationSet, evaluation_set
from draftplus.evaluation.pictures import to_pil
from draftplus.metrics.lpips import lpips_per_prompt
from tests.support import rewards
from tests.support.processes import commands
from tests.support.runs import REWARDS, configure, rows, small_settings, train_here
from tests.tiny import CPU

EVERY = ["train.steps=4", "eval.every=2", "eval.images_per_prompt=3"]


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings(small, tmp_path_factory.mktemp("evaluated"))
    more = "reward={tests.support.rewards:redness: {weight: 2.0}, tests.support.rewards:by_prompt: {weight: -0.5}}"
    held_out = "eval.rewards={tests.support.rewards:measured_only: {}}"
    return train_here(settings, *EVERY, more, held_out)


@pytest.fixture(scope="module")
def images(run: Path) -> dict[int, Tensor]:
    """What `generate` makes of the evaluation's prompts and seeds, by step."""
    made = {}
    for step in (0, 2, 4):
        parts = [api.generate(f"{run}@{step}", [prompt], seeds) for prompt, seeds in jobs(run)]
        made[step] = torch.cat(parts)
    return made


def jobs(run: Path) -> list[tuple[str, range]]:
    config = configure([str(run / "config.yaml")])
    prompts = evaluation_set(config, load_prompts(config.data.prompts)).prompts
    return [(prompt, range(3 * number, 3 * number + 3)) for number, prompt in enumerate(prompts)]


@pytest.mark.slow
def test_it_happens_at_the_start_every_so_often_and_at_the_end(run: Path, settings: list[str]) -> None:
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [0, 2, 4]
    other = train_here(settings, "train.steps=3", "eval.every=2")
    assert [row["step"] for row in rows(other / "eval.jsonl")] == [0, 2, 3]


def test_scores_are_of_the_images_by_seed(run: Path, images: dict[int, Tensor]) -> None:
    told = [prompt for prompt, seeds in jobs(run) for _ in seeds]
    for row in rows(run / "eval.jsonl"):
        made = images[row["step"]]
        for name in ("redness", "by_prompt", "measured_only"):
            expected = getattr(rewards, name)(made, told).tolist()
            assert row["per_image"][f"{REWARDS}:{name}"] == pytest.approx(expected, abs=2e-3)
            assert len(set(expected)) == len(expected), "equal scores would not show an order"
        assert row["images"] == len(told)


def test_means_are_of_the_images(run: Path) -> None:
    for row in rows(run / "eval.jsonl"):
        for name, scores in row["per_image"].items():
            assert row[f"reward/{name}"] == pytest.approx(sum(scores) / len(scores), rel=1e-12)
        total = 2.0 * row[f"reward/{REWARDS}:redness"] - 0.5 * row[f"reward/{REWARDS}:by_prompt"]
        assert row["reward"] == pytest.approx(total, rel=1e-12)


def test_the_best_step_is_the_one_of_the_weighted_sum(run: Path) -> None:
    import json

    tuned = [row for row in rows(run / "eval.jsonl") if row["step"] > 0]
    best = json.loads((run / "best.json").read_text())
    assert best["step"] == max(tuned, key=lambda row: row["reward"])["step"]
    assert best["value"] == max(row["reward"] for row in tuned)


def test_lpips_is_of_the_images(run: Path, images: dict[int, Tensor]) -> None:
    told = [prompt for prompt, seeds in jobs(run) for _ in seeds]
    for row in rows(run / "eval.jsonl"):
        expected = lpips_per_prompt(images[row["step"]], told)
        assert row["lpips_per_prompt"].keys() == expected.keys()
        for prompt, value in expected.items():
            assert row["lpips_per_prompt"][prompt] == pytest.approx(value, rel=1e-3)
        assert row["lpips"] == pytest.approx(sum(expected.values()) / len(expected), rel=1e-3)


def test_pictures_are_saved(run: Path, images: dict[int, Tensor]) -> None:
    for step, made in images.items():
        directory = run / "samples" / f"step-{step:06d}"
        names = [
            f"{number:02d}-{prompt.replace(' ', '-')}-{seed}.png"
            for number, (prompt, seeds) in enumerate(jobs(run))
            for seed in seeds
        ]
        assert sorted(path.name for path in directory.iterdir()) == sorted([*names, "grid.png"])
        for name, image in zip(names, made, strict=True):
            saved = numpy.asarray(Image.open(directory / name)).astype(int)
            assert abs(saved - numpy.asarray(to_pil(image)).astype(int)).max() <= 1
        assert Image.open(directory / "grid.png").size == (3 * 32 + 2 * 2, 2 * 32 + 2)


def test_before_and_after_differ(images: dict[int, Tensor]) -> None:
    assert (images[0] - images[4]).abs().max() > 0.01


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Every noise that is drawn, by what for: an evaluation, or a stream of training."""
    drawn: dict[str, list[bytes]] = {}
    normal, stock = rng.normal, rng.stock_noise

    def note(name: str, noise: Tensor) -> Tensor:
        drawn.setdefault(name, []).extend(one.numpy().tobytes() for one in noise)
        return noise

    def of_training(shape: Sequence[int], seed: int, stream: str, *rest: Any) -> Tensor:
        return note(stream, normal(shape, seed, stream, *rest))

    def of_evaluation(shape: Sequence[int], seeds: Iterable[int], *rest: Any) -> Tensor:
        return note("evaluation", stock(shape, seeds, *rest))

    monkeypatch.setattr(rng, "normal", of_training)
    monkeypatch.setattr(rng, "stock_noise", of_evaluation)
    return drawn


@pytest.mark.slow
def test_noise_is_never_that_of_training(settings: list[str], noises: dict[str, list[bytes]]) -> None:
    """And it is the same at every evaluation, while training never repeats any, in no stream."""
    train_here(settings, *EVERY, "objective.method=draft_lv", "train.micro_batch_size=2")
    training = {one for name, many in noises.items() if name != "evaluation" for one in many}
    per_evaluation = 2 * 3
    evaluations = [
        noises["evaluation"][start : start + per_evaluation] for start in range(0, 3 * per_evaluation, per_evaluation)
    ]
    assert len(noises["evaluation"]) == 3 * per_evaluation
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert len(set(evaluations[0])) == per_evaluation
    assert not training & set(evaluations[0])
    assert len(set(noises["x_T"])) == 4 * 4, "one for each image of each step"
    assert len(set(noises["draft_lv"])) == 2 * 4 * 4
    assert not set(noises["x_T"]) & set(noises["draft_lv"])


@pytest.mark.slow
def test_prompts_are_never_those_of_training(settings: list[str], tmp_path: Path) -> None:
    """As they are scored; a prompt that differs only in case and white space is the same."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a {a}\nA  {a.upper()}\n" for a in ("cat", "dog", "bee", "fox", "pig", "cow")))
    rewards.SEEN.clear()
    train_here(settings, "eval.every=2", "train.steps=6", reward="recorded")
    trained = {normalized(prompt) for gradient, prompt in rewards.SEEN if gradient}
    evaluated = {normalized(prompt) for gradient, prompt in rewards.SEEN if not gradient}
    assert len(trained) == 5 and len(evaluated) == 1
    assert not trained & evaluated


@pytest.mark.slow
def test_an_evaluation_prompt_that_is_trained_on_is_refused(settings: list[str], tmp_path: Path) -> None:
    others = tmp_path / "others.txt"
    others.write_text("a zebra\nA   CAT\n")
    with pytest.raises(UserError, match="also a training prompt"):
        train_here(settings, f"eval.prompts={others}")
    others.write_text("a zebra\na zebra\na newt\n")
    run = train_here(settings, f"eval.prompts={others}")
    assert list(rows(run / "eval.jsonl")[0]["lpips_per_prompt"]) == ["a zebra", "a newt"]


def test_prompts_are_thinned_evenly(settings: list[str], tmp_path: Path) -> None:
    others = tmp_path / "others.txt"
    others.write_text("".join(f"prompt {n}\n" for n in range(10)))

    def chosen(most: str) -> list[str]:
        config = configure([*settings, f"eval.prompts={others}", f"eval.max_prompts={most}"])
        return evaluation_set(config, load_prompts(config.data.prompts)).prompts

    assert chosen("3") == ["prompt 0", "prompt 3", "prompt 6"]
    assert len(chosen("null")) == len(chosen("10")) == 10


@pytest.mark.parametrize("most", ["eval.images_per_prompt=1", "data.prompts={directory}/few.txt"])
def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(
    settings: list[str], tmp_path: Path, most: str
) -> None:
    (tmp_path / "few.txt").write_text("a cat\na dog\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match=r"eval\."):
        train_here(settings, most.format(directory=tmp_path), f"model.path={tmp_path / 'empty'}")


def test_jobs_of_ranks_are_whole_prompts_and_make_up_the_set() -> None:
    which = EvaluationSet(["a", "b", "c"], 2)
    parts = [which.jobs(rank, 2) for rank in range(2)]
    assert sorted((job for part in parts for job in part), key=lambda job: job.seed) == which.jobs()
    assert not {job.prompt for job in parts[0]} & {job.prompt for job in parts[1]}
    assert [job.seed for job in which.jobs()] == list(range(6))


@pytest.mark.parametrize(("prompts", "size"), [(3, 2), (4, 2), (2, 3), (1, 4), (7, 3)])
def test_all_ranks_make_the_same_number_of_images(prompts: int, size: int) -> None:
    """Since a sharded model's forward pass takes all of them; what one makes too much is thrown away."""
    which = EvaluationSet([f"prompt {i}" for i in range(prompts)], 3)
    made = [len(which.jobs(rank, size) + which.padding(rank, size)) for rank in range(size)]
    assert set(made) == {3 * -(-prompts // size)}
    assert which.padding(0, 1) == []


@pytest.mark.slow
def test_two_ranks_evaluate_alike(settings: list[str], tmp_path: Path) -> None:
    """Also where there are fewer prompts than ranks."""
    for most in (1, 2):
        more = [*settings, f"reward={REWARDS}:by_prompt", "train.steps=1", f"eval.max_prompts={most}"]
        children = commands(["train", *more, f"name=two{most}"], tmp_path / str(most), 2)
        assert [child.wait() for child in children] == [0, 0]
        alone = rows(train_here(more, f"name=alone{most}") / "eval.jsonl")
        for ours, theirs in zip(rows(tmp_path / "runs" / f"two{most}" / "eval.jsonl"), alone, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ("reward", "lpips", "images"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4)
            for name, scores in theirs["per_image"].items():
                assert ours["per_image"][name] == pytest.approx(scores, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["wrong_shape", "broken"])
def test_rewards_are_checked_as_in_training(name: str) -> None:
    images = torch.rand(4, 3, 32, 32)
    expected = UserError if name == "wrong_shape" else ZeroDivisionError
    with pytest.raises(expected, match="shape" if name == "wrong_shape" else "user's own"):
        score_images({name: rewards_of(name)}, images, ["a cat"] * 4, CPU)


def rewards_of(name: str) -> Any:
    return api.load_reward(f"{REWARDS}:{name}", device="cpu")


def test_one_process_is_the_whole_world() -> None:
    assert World(0, 1, CPU).gather("x") == ["x"]
