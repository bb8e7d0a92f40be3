"""HPSv2 against its own package, whose scores of drawn weights `tests/parity/rewards/make_clip.py` keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards import hpsv2
from draftplus.rewards.hpsv2 import VIT_H, load_hpsv2, of_transformers
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, preprocess
from tests.parity.rewards.drawn import PROMPTS
from tests.support.originals import (
    CLIP_SAYS,
    clip_config,
    drawn,
    errors,
    images,
    published_names,
    save_tokenizer,
    slopes,
)

FILE = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small network in a file laid out as the published one, and CLIP's tokenizer."""
    directory = tmp_path_factory.mktemp("hpsv2")
    torch.save({"state_dict": drawn(CLIP_SAYS["names"]["clip"])}, directory / FILE)
    return save_tokenizer(directory)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv2, "VIT_H", clip_config())


def test_scores_of_the_original(published: Path) -> None:
    """It resizes float tensors, as we do, so that all sizes agree closely."""
    found = errors("hpsv2", load_hpsv2(published))
    assert len(found) == 5 and max(found.values()) < 1e-4, found


def test_tokens_of_the_original(published: Path) -> None:
    tokenizer = load_hpsv2(published).tokenizer
    assert tokenizer(PROMPTS, truncation=True, max_length=77)["input_ids"] == CLIP_SAYS["tokens"]


@pytest.mark.parametrize("size", [(64, 40), (224, 224)], ids=str)
def test_gradient_equals_finite_differences(published: Path, size: tuple[int, int]) -> None:
    gradient, difference = slopes(load_hpsv2(published, dtype=torch.float64), *size)
    assert gradient == pytest.approx(difference, rel=1e-5) and abs(gradient) > 1e-6


def test_names_and_shapes_of_the_published_network() -> None:
    """Of the original's own ViT-H/14, of whose blocks the first stands for all."""
    with torch.device("meta"):
        network = CLIPModel(CLIPConfig(**VIT_H))
        found = of_transformers({name: torch.empty(shape) for name, shape in published_names().items()})
    assert sum(tensor.numel() for tensor in found.values()) == 986_109_441
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }


def test_the_file_itself_the_other_version_and_another_tokenizer(published: Path, tmp_path: Path) -> None:
    named = load_hpsv2(published / FILE)
    (tmp_path / "HPS_v2_compressed.pt").symlink_to(published / FILE)
    other = load_hpsv2(tmp_path, version="v2", processor=str(published))
    assert {parameter.dtype for parameter in named.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in named.model.parameters())
    pictures = images(96, 64)
    assert torch.equal(named(pictures, PROMPTS), other(pictures, PROMPTS))


def test_padding_is_black_before_normalisation_and_on_both_sides(published: Path) -> None:
    spec = load_hpsv2(published).preprocessing
    wide = preprocess(torch.ones(1, 3, 101, 224), spec)
    assert wide.shape == (1, 3, 224, 224)
    black, white = (
        (value - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None] for value in (0, 1)
    )
    assert torch.equal(wide[0, :, :61], black.expand(3, 61, 224))  # 123 rows are missing
    assert torch.equal(wide[0, :, 61:162], white.expand(3, 101, 224))
    assert torch.equal(wide[0, :, 162:], black.expand(3, 62, 224))
    assert preprocess(torch.ones(1, 3, 300, 7), spec).shape == (1, 3, 224, 224)


def test_a_contrasting_text_is_subtracted(published: Path) -> None:
    plain, pictures = load_hpsv2(published), images(96, 64)
    relative = load_hpsv2(published, negative="a blurry picture")
    expected = plain(pictures, PROMPTS) - plain(pictures, ["a blurry picture"] * 4)
    torch.testing.assert_close(relative(pictures, PROMPTS), expected)
    relative.negative = "A blurry picture of {prompt}"
    expected = plain(pictures, PROMPTS) - plain(pictures, [f"A blurry picture of {prompt}" for prompt in PROMPTS])
    torch.testing.assert_close(relative(pictures, PROMPTS), expected)
    gradient, difference = slopes(load_hpsv2(published, dtype=torch.float64, negative="a dog"), 64, 40)
    assert gradient == pytest.approx(difference, rel=1e-5) and abs(gradient) > 1e-6


def test_a_prompt_that_is_too_long_is_told_once(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from draftplus.errors import notice

    notice.cache_clear()
    reward = load_hpsv2(published)
    reward(images(96, 64), PROMPTS)
    reward(images(96, 64)[:1], [f"another one {PROMPTS[-1]}"])
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "reads the first 77" in told and f"{PROMPTS[-1][:60]!r}…" in told
    exact = " ".join(["cat"] * 75)
    load_hpsv2(published)(images(96, 64)[:1], [exact])
    assert capsys.readouterr().err == ""


def other_size(tensors: dict[str, Any]) -> None:
    tensors["visual.positional_embedding"] = torch.zeros(442, 160)


def as_transformers_names_them(tensors: dict[str, Any]) -> None:
    converted = of_transformers(dict(tensors))
    tensors.clear()
    tensors.update(converted, text_extra=torch.ones(1))


def aesthetic_head(tensors: dict[str, Any]) -> None:
    tensors.clear()
    tensors.update(drawn(CLIP_SAYS["names"]["aesthetic"]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_size, r"1 of another shape: vision_model\S+position_embedding.weight \(442, 160\), not \(197, 160\)"),
        (as_transformers_names_them, "1 unknown: text_extra"),
        (aesthetic_head, r"missing: logit_scale, .* more; 10 unknown: layers.0.weight"),
        (lambda tensors: tensors.pop("visual.proj"), "1 missing: visual_projection.weight"),
        (lambda tensors: tensors.update({"visual.head": torch.ones(2)}), "1 unknown: visual.head"),
    ],
)
def test_weights_of_another_network_are_refused(published: Path, tmp_path: Path, spoil: Any, words: str) -> None:
    tensors = drawn(CLIP_SAYS["names"]["clip"])
    spoil(tensors)
    torch.save({"state_dict": tensors}, tmp_path / FILE)
    with pytest.raises(UserError, match=rf"reward.hpsv2.path '.*' has not the weights(.|\n)*{words}"):
        load_hpsv2(tmp_path, processor=str(published))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"args": {"version": "v3"}}, "args.version is 'v3'; it must be v2.1 or v2"),
        ({"args": {"dropout": 1.5}}, "args.dropout is 1.5"),
        ({"args": {"versoin": "v2"}}, "did you mean 'version'"),
        ({"path": "absent.pt", "args": {"processor": "."}}, "no tokenizer.json"),
    ],
)
def test_settings_that_do_not_fit(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_reward("hpsv2", RewardConfig(**config), torch.device("cpu"))
