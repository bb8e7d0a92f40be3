"""LAION's aesthetic score against its few lines on open_clip, whose scores `tests/parity/rewards/` keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus.errors import UserError
from draftplus.rewards.aesthetic import FILE, load_aesthetic
from draftplus.rewards.offloaded import networks_of
from tests.support.originals import CLIP_SAYS, drawn, errors, images, save_clip, slopes


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_clip(tmp_path_factory.mktemp("clip"), "quick_gelu", 768))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the head in a file laid out as the published one, in float32."""
    directory = tmp_path_factory.mktemp("head")
    torch.save({name: tensor.float() for name, tensor in head_tensors().items()}, directory / FILE)
    return directory


def head_tensors() -> dict[str, torch.Tensor]:
    return drawn(CLIP_SAYS["names"]["aesthetic"])


def test_scores_of_the_original(head: Path, clip: str) -> None:
    found = errors("aesthetic", load_aesthetic(head, clip=clip))
    assert found.pop((224, 224)) < 1e-4
    assert len(found) == 4 and max(found.values()) < 1e-2, found  # PIL rounds what it resizes to 8 bits


def test_gradient_equals_finite_differences(head: Path, clip: str) -> None:
    reward = load_aesthetic(head / FILE, clip=clip, dtype=torch.float64)
    gradient, difference = slopes(reward, 64, 40)
    assert gradient == pytest.approx(difference, rel=1e-5) and abs(gradient) > 1e-6


def test_prompts_do_not_matter_and_the_text_tower_is_let_go(head: Path, clip: str) -> None:
    reward = load_aesthetic(head, clip=clip)
    pictures = images(96, 64)
    scores = reward(pictures, ["a cat"] * 4)
    assert torch.equal(scores, reward(pictures, ["a dog"] * 4)) and scores.dtype == torch.float32
    kept = [name for network in networks_of(reward) for name, _ in network.named_parameters()]
    assert "layers.0.weight" in kept and "visual_projection.weight" in kept
    assert not any(name.startswith("text_") for name in kept)


def test_dropout_is_active_in_training_alone(head: Path, clip: str) -> None:
    noisy, plain = (load_aesthetic(head, clip=clip, dropout=rate) for rate in (0.3, 0.0))
    pictures = images(96, 64)[:2]
    assert torch.equal(noisy(pictures, ["a", "b"]), plain(pictures, ["a", "b"]))
    assert not torch.equal(noisy(pictures.requires_grad_(), ["a", "b"]), plain(pictures, ["a", "b"]))


def test_checkpoints_without_the_head_and_features_of_another_length(head: Path, clip: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no sac\+logos\+ava1-l14-linearMSE.pth; it has model.safetensors"):
        load_aesthetic(clip, clip=clip)
    with pytest.raises(UserError, match=r"10 missing: layers.0.weight, .*; \d+ unknown: logit_scale"):
        load_aesthetic(f"{clip}/model.safetensors", clip=clip)
    tensors = {name: tensor for name, tensor in head_tensors().items() if not name.startswith("layers.7.")}
    torch.save(tensors, tmp_path / FILE)
    with pytest.raises(UserError, match=r"2 missing: layers.7.weight, layers.7.bias\.$"):
        load_aesthetic(tmp_path, clip=clip)
    small = str(save_clip(tmp_path / "small", "quick_gelu", 64))
    with pytest.raises(UserError, match=r"features of '.*small' have length 64, but its head takes 768"):
        load_aesthetic(head, clip=small)
