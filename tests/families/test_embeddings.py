"""Large text encoders are read where a prompt must be embedded, not beside the denoiser, once for all commands."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus import api
from draftplus.errors import notice
from draftplus.models import loading
from draftplus.models.pipeline import PipelineModel
from tests.families.cases import PROMPTS, Case, load_model
from tests.support.runs import fingerprint, small_settings, train_here

GIVEN = [*PROMPTS, None, ""]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTPLUS_CACHE", str(tmp_path / "cache"))
    notice.cache_clear()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the networks that are read, in order."""
    names: list[str] = []
    load_part = loading.load_part

    def noted(cls: Any, source: Any, name: str, dtype: Any) -> Any:
        names.append(name)
        return load_part(cls, source, name, dtype)

    monkeypatch.setattr(loading, "load_part", noted)
    return names


def prepare(model: PipelineModel, *prompts: str | None) -> None:
    model.prepare(prompts, lambda done, note: None)


def encoders_of(read: list[str]) -> list[str]:
    return [name for name in read if name.startswith("text_encoder")]


def test_encoders_go_before_the_denoiser_comes(directory: Path, read: list[str]) -> None:
    model = load_model(directory)
    if not model.kind.large_encoders:
        prepare(model, *GIVEN)
        assert read == ["vae"], "they stay, and come when they are needed"
        return
    model._open()
    watched = [weakref.ref(model.pipe.components[name]) for name in encoders_of(read)]
    prepare(model, *GIVEN)
    assert watched and all(one() is None for one in watched), "something holds an encoder"
    assert model.kind.component not in read
    before = len(read)
    rows = model.encode(GIVEN)
    assert len(model.tuned.trainable()) > 0 and read[before:] == [model.kind.component]

    plain = load_model(directory)
    plain.encode._store = None
    expected = plain.encode(GIVEN)
    assert torch.equal(rows.hidden, expected.hidden) and rows.extras.keys() == expected.extras.keys()
    assert all(torch.equal(rows.extras[key], expected.extras[key]) for key in rows.extras)
    assert (rows.mask is None) == (expected.mask is None) and (rows.mask is None or rows.mask.equal(expected.mask))


def test_a_prompt_that_was_not_prepared(directory: Path) -> None:
    model = load_model(directory)
    prepare(model, "a cat")
    found, expected = model.encode(["a cat", "a dog"]), load_model(directory).encode(["a cat", "a dog"])
    assert torch.equal(found.hidden, expected.hidden) and not found.hidden[0].equal(found.hidden[1])


def test_precisions_and_models_are_kept_apart(directory: Path, read: list[str]) -> None:
    made = [load_model(directory, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for model in made:
        before = len(encoders_of(read))
        model.encode(["a cat"])
        assert len(encoders_of(read)) > before
    assert len({model.encode(["a cat"]).hidden.dtype for model in made}) == 3


def test_the_encoders_are_read_once_for_all_commands(
    directory: Path, case: Case, tmp_path: Path, read: list[str]
) -> None:
    height, width = case.sizes[1]
    settings = [
        *small_settings(directory, tmp_path), "train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=2",
        "eval.max_prompts=1", f"sampler.height={height}", f"sampler.width={width}",
        f"sampler.guidance_scale={case.guided}",
    ]  # fmt: skip
    first = train_here(settings, "name=first")
    if not load_model(directory).kind.large_encoders:
        return
    encoders = encoders_of(read)
    assert len(encoders) == len(set(encoders)) > 0
    assert fingerprint(train_here(settings, "name=second")) == fingerprint(first)
    held_out = (first / "samples" / "prompts.json").read_text()
    assert api.generate(str(first), [held_out.split('"')[1]], [0]).shape == (1, 3, height, width)
    assert encoders_of(read) == encoders, "an encoder was read again"


def test_long_prompts_are_counted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(directory)
    if not model.kind.lengths(model.pipe, "a cat"):
        pytest.skip("this family does not tell")
    long = "a " + "very " * 2000 + "long cat"
    told = {name.replace("tokenizer", "text_encoder"): of for name, of in model.kind.lengths(model.pipe, long).items()}
    limits = {name: limit for name, (_, limit) in told.items() if limit < 2000}
    assert limits
    prepare(model, "a cat", long, "a dog")
    model.encode(["a cat", long])
    said = capsys.readouterr().err.splitlines()
    for name, limit in limits.items():
        line = next(line for line in said if name in line.replace(";", " ").split() and str(limit) in line)
        assert "1 of 3 prompts" in line or not model.kind.large_encoders
    if len(limits) == len(told):
        assert torch.equal(model.encode([long]).hidden, model.encode([long + " and more"]).hidden)
