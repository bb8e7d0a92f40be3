"""PickScore and CLIP-H against independent code on open_clip, and `clip`, which takes any CLIPModel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.clip import load_clip, load_clip_h, load_clip_score, load_pickscore
from tests.parity.rewards.drawn import PROMPTS
from tests.support.originals import errors, images, save_clip, slopes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(("name", "load"), [("pickscore", load_pickscore), ("clip_h", load_clip_h)])
def test_scores_of_independent_code(checkpoint: Path, name: str, load: Any) -> None:
    """The scores are kept by `tests/parity/rewards/make_clip.py`."""
    found = errors(name, load(checkpoint))
    assert found.pop((224, 224)) < 1e-4
    assert len(found) == 4 and max(found.values()) < 1e-2, found  # PIL rounds what it resizes to 8 bits


@pytest.mark.parametrize("load", [load_pickscore, load_clip])
def test_gradient_equals_finite_differences(checkpoint: Path, load: Any) -> None:
    gradient, difference = slopes(load(checkpoint, dtype=torch.float64), 96, 64)
    assert gradient == pytest.approx(difference, rel=1e-5) and abs(gradient) > 1e-4


def test_a_contrasting_text_is_subtracted_after_each_score_was_cut_off(checkpoint: Path) -> None:
    pictures = images(96, 64)
    plain, relative = load_clip_score(checkpoint), load_clip_score(checkpoint, negative="a blurry picture")
    expected = plain(pictures, PROMPTS) - plain(pictures, ["a blurry picture"] * 4)
    torch.testing.assert_close(relative(pictures, PROMPTS), expected)
    assert expected.abs().max() > 1 and plain(pictures, PROMPTS).min() == 0
    relative.negative = "{prompt}"
    assert relative(pictures, PROMPTS).abs().max() == 0


def test_clip_is_any_model_and_needs_its_path(checkpoint: Path) -> None:
    device = torch.device("cpu")
    given = build_reward("clip", RewardConfig(path=str(checkpoint)), device)
    pictures = images(96, 64)
    assert torch.equal(given(pictures, PROMPTS), load_pickscore(checkpoint)(pictures, PROMPTS))
    with pytest.raises(UserError, match=r"set reward.clip.path to .* CLIPModel, .* draftplus reward train"):
        build_reward("clip", RewardConfig(), device)


def test_offline_it_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("draftplus.rewards.checkpoints.why_offline", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(
        UserError, match=r"(?s)no preprocessor_config.json.*\nRun: hf download nobody/nothing tokenizer.json "
    ):
        load_clip("nobody/nothing")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_size": {"height": 336, "width": 336}}, r"crops images to \(336, 336\), .* takes \(224, 224\)"),
        ({"do_center_crop": False, "size": {"height": 378, "width": 378}}, r"resizes images to \(378, 378\), .*224"),
        ({"do_center_crop": False, "size": {"shortest_edge": 256}}, r"resizes images to 256, .* takes \(224, 224\)"),
    ],
)
def test_an_image_tower_that_wants_another_size(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(UserError, match=words):
        load_clip(tmp_path / "copy")
