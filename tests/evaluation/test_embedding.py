"""Commands embed what they need before anything is made of it, and once for all commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.data.batches import batch, visited
from draftplus.models import families
from tests.support import stored
from tests.support.processes import ranks
from tests.support.runs import ANIMALS, fingerprint, rows, train_here

ALL = len(ANIMALS) + 1  # the held-out prompts and the negative prompt too


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family of large encoders, and an empty store."""
    monkeypatch.setenv("DRAFTPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(families.FAMILIES, "StableDiffusionPipeline", stored.stored_family())
    stored.EMBEDDED.clear()
    stored.LOADED.clear()
    return tmp_path / "cache"


def embedded() -> int:
    """How many prompts were embedded since the last call."""
    count = len(stored.EMBEDDED)
    stored.EMBEDDED.clear()
    return count


@pytest.mark.parametrize("size", [6, 20])
def test_which_prompts_some_steps_visit(size: int) -> None:
    prompts = [f"{i}" for i in range(17)]
    for first in range(6):
        for last in range(first, 14):
            steps = range(first, last)
            drawn = {one for step in steps for one in batch(prompts, step, 3, size, 2).prompts}
            assert set(visited(prompts, steps, 3, size, 2)) == drawn


@pytest.mark.slow
def test_a_cold_store_a_warm_one_and_none(settings: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*settings, "train.steps=5"]  # every prompt once
    cold = train_here(settings, "name=cold")
    assert sorted(stored.EMBEDDED) == sorted({*(f"a {animal}" for animal in ANIMALS), ""})
    embedded()
    warm = train_here(settings, "name=warm")
    assert embedded() == 0 and [one.loads for one in stored.LOADED] == [1, 0]
    monkeypatch.undo()
    plain = train_here(settings, "name=plain")
    assert embedded() == 0
    assert fingerprint(cold) == fingerprint(warm) == fingerprint(plain)
    assert rows(cold / "eval.jsonl") == rows(warm / "eval.jsonl") == rows(plain / "eval.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False], ids=["warm", "cold"])
def test_resume_equals_uninterrupted(settings: list[str], cache: Path, keeps: bool) -> None:
    settings = [*settings, "objective.kl_coeff=0.5", "eval.every=2"]
    whole = train_here(settings, "name=whole")
    train_here(settings, "train.steps=2")
    embedded()
    if not keeps:
        shutil.rmtree(cache)
    run = train_here(settings)
    assert fingerprint(run) == fingerprint(whole) and rows(run / "eval.jsonl") == rows(whole / "eval.jsonl")
    assert embedded() == (0 if keeps else 4 * 2 + 2 + 1), "the prompts of two steps, two held out, and the negative one"


def test_only_what_a_run_visits(settings: list[str]) -> None:
    train_here(settings, "train.steps=2")
    assert embedded() == 2 * 4 + 2 + 1
    train_here(settings, "train.steps=2")
    assert embedded() == 0 and stored.LOADED[-1].text_encoder is None


def test_a_dry_run_embeds_its_one_step(settings: list[str]) -> None:
    api.describe(settings[0])
    assert embedded() == 4 + 1


@pytest.mark.slow
def test_generate_and_evaluate(settings: list[str], tmp_path: Path, small: Path) -> None:
    run = train_here(settings, "train.steps=1", "eval.images_per_prompt=2")
    embedded()
    first = api.generate(str(run), ["a cat", "a zebra"], [0, 1])
    assert "a zebra" in stored.EMBEDDED
    embedded()
    assert torch.equal(api.generate(str(run), ["a cat", "a zebra"], [0, 1]), first)
    assert embedded() == 0
    told = {"prompts": ["a zebra", "a newt"], "images_per_prompt": 2, "output": tmp_path / "e"}
    one = api.evaluate([str(run)], **told)
    assert stored.EMBEDDED == ["a newt"], "the two targets have one text encoder"
    shutil.rmtree(tmp_path / "cache")
    embedded()
    assert api.evaluate([str(run)], **told) == one
    assert embedded() == 0, "every image had been made"
    assert [made.loads for made in stored.LOADED] == [1, 1, 0, 1, 0, 0, 0]  # train, generate twice, evaluate twice


def test_progress_with_the_time_left(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("draftplus.progress.FIRST", 0.0)
    train_here(settings, "train.steps=1")
    said = capsys.readouterr().err
    assert "embedding prompts: 0 of 7 prompts" in said and "embedding prompts: done in" in said
    train_here(settings, "train.steps=1", "name=warm")
    assert "embedding prompts" not in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks(settings: list[str], tmp_path: Path, cache: Path) -> None:
    alone = train_here(settings, "name=alone")
    needed = embedded()
    shutil.rmtree(cache)
    files = tmp_path / "calls"
    children = ranks(stored.train_on_a_rank, [[*settings, "name=two"], str(cache)], files, 2)
    assert [child.wait() for child in children] == [0, 0], [child.err.read_text() for child in children]
    calls = [(files / f"rank{rank}" / "calls.txt").read_text().split() for rank in range(2)]
    assert sorted(int(embedded) for embedded, _ in calls) == [needed // 2, needed - needed // 2]
    assert [loads for _, loads in calls] == ["1", "1"]
    two, one = (rows(run / "metrics.jsonl") for run in (tmp_path / "runs" / "two", alone))
    assert [row["reward"] for row in two] == pytest.approx([row["reward"] for row in one], rel=1e-5)


@pytest.mark.slow
def test_ranks_that_share_no_disk(settings: list[str], tmp_path: Path) -> None:
    files = tmp_path / "calls"
    children = ranks(stored.train_on_a_rank, [settings, "cache"], files, 2)  # below their own directories
    assert [child.wait() for child in children] == [0, 0], [child.err.read_text() for child in children]
    caches = [sorted(one.name for one in (files / f"rank{rank}/cache/embeddings").iterdir()) for rank in range(2)]
    assert caches[0] == caches[1] and len(caches[0]) == 16 + 2 + 1
