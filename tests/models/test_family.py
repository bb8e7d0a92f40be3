"""A model's family is known from its index, and says how it is sampled where nothing is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus import api, build
from draftplus.config import ModelConfig, load_config
from draftplus.errors import UserError
from draftplus.models import families
from draftplus.runs.plan import plan_run
from draftplus.runs.weights import find_weights
from tests.tiny import CPU, save_tiny, stock_pipeline


def sampling(*overrides: str) -> tuple[Any, ...]:
    sampler = families.resolve(load_config(None, overrides)).sampler
    return sampler.steps, sampler.guidance_scale, sampler.negative_prompt


def test_nulls_are_what_the_stock_pipeline_does(tiny_path: Path) -> None:
    assert sampling(f"model.path={tiny_path}") == (50, 7.5, "")
    assert sampling(f"model.path={tiny_path}", "sampler.steps=3", "sampler.negative_prompt=grey") == (3, 7.5, "grey")
    assert sampling() == (10, 1.75, "")  # the embedded model has its own
    assert find_weights(str(tiny_path)).config.sampler.steps == 50
    assert plan_run(load_config(None, [f"model.path={tiny_path}"]), [])[0].sampler.guidance_scale == 7.5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_without_settings_a_picture_is_the_stock_pipelines(tmp_path: Path) -> None:
    """All arguments at their defaults on both sides; the directory's scheduler is DDIM."""
    directory = save_tiny(tmp_path / "model", seed=4)
    ours = api.generate(str(directory), ["a cat"], [5], ["device=cpu"])
    pipe = stock_pipeline(directory, torch.float32)
    generator = torch.Generator("cpu").manual_seed(5)
    stock = torch.from_numpy(pipe("a cat", generator=generator, output_type="np").images).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-3)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that has indexes only. Returns what it is asked for."""
    asked: list[tuple[Any, ...]] = []
    indexes = {"someone/pixart": "PixArtSigmaPipeline", "me/fine": "StableDiffusionPipeline"}

    def download(path: str, name: str, revision: str | None = None) -> str:
        asked.append((path, name, revision))
        if path not in indexes:
            raise OSError("no such repository\nand more")
        file = tmp_path / name
        file.write_text(json.dumps({"_class_name": indexes[path]}))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    families.hub_index.cache_clear()
    yield asked
    families.hub_index.cache_clear()


def test_a_hub_id_is_asked_for_its_index_first(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match=r"'someone/pixart' is a PixArtSigmaPipeline"):
        build.build_model(ModelConfig(path="someone/pixart"), CPU)
    assert hub == [("someone/pixart", "model_index.json", None)]
    assert sampling("model.path=me/fine", "model.revision=v2") == (50, 7.5, "")
    assert hub[1:] == [("me/fine", "model_index.json", "v2")]
    sampling("model.path=me/fine", "model.revision=v2")
    assert len(hub) == 2, "asked once in a process"


def test_a_hub_id_that_is_not_there(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UserError, match=r"'me/other': .*no such repository.*hub") as error:
        families.family_of(ModelConfig(path="me/other"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", ["[]", "{", '{"name": 1}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="not a diffusers model index"):
        families.family_of(ModelConfig(path=str(tmp_path)))
