"""ImageReward against the package that it was published with, which `tests/parity/originals/image_reward.py` ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.clip import EMOJI_CLIP
from draftplus.rewards.image_reward import MEAN, STD, ImageReward, load_image_reward
from tests.support import published

ORIGINAL = json.loads((Path(__file__).parents[1] / "parity" / "originals" / "image_reward.json").read_text())
RANGE = max(map(max, ORIGINAL["scores"])) - min(map(min, ORIGINAL["scores"]))


def save(directory: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """A directory with the published file and the vocabulary."""
    if tensors is None or "mlp.layers.0.weight" in tensors:
        return published.save_image_reward(directory, tensors or published.image_reward())
    published.save_image_reward(directory, published.image_reward())
    torch.save(tensors, directory / "ImageReward.pt")
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def reward(directory: Path) -> ImageReward:
    return load_image_reward(directory)  # type: ignore[return-value]


def image(number: int) -> Tensor:
    return torch.from_numpy(published.pictures()[number]).permute(2, 0, 1)[None] / 255


def scores(reward: ImageReward, number: int) -> Tensor:
    return reward(image(number).expand(len(published.PROMPTS), -1, -1, -1), published.PROMPTS)


def test_scores_are_the_original_packages(reward: ImageReward) -> None:
    """Pictures of the network's size to 1e-5 of the range; those that the original resizes to 8 bits to 1e-2."""
    assert [tuple(size) for size in ORIGINAL["sizes"]] == published.SIZES
    for number, expected in enumerate(ORIGINAL["scores"]):
        found = scores(reward, number)
        assert found.shape == (len(expected),) and found.dtype == torch.float32
        assert (found - torch.tensor(expected)).abs().max() < (1e-5 if number == 0 else 1e-2) * RANGE


def test_tokens_are_the_original_packages(reward: ImageReward) -> None:
    """Accents, an added token that a prompt spells out, unknown words, nothing, and more than 35 tokens."""
    for prompt, expected in zip(published.PROMPTS, ORIGINAL["tokens"], strict=True):
        ids, mask = reward.captions(prompt)
        assert ids.tolist() == expected and mask.tolist() == [int(one != 0) for one in expected]


def test_every_prompt_is_scored_as_if_it_were_alone(reward: ImageReward) -> None:
    alone = torch.cat([reward(image(1), [prompt]) for prompt in published.PROMPTS])
    torch.testing.assert_close(scores(reward, 1), alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("number", [0, 1])
def test_the_gradient_agrees_with_finite_differences(directory: Path, number: int) -> None:
    reward = load_image_reward(directory, dtype=torch.float64)
    pixels = image(number).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(pixels, ["a red fox"]).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        above, below = (reward(pixels + sign * step * direction, ["a red fox"]).sum() for sign in (1, -1))
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=0)


def test_no_tensor_of_the_file_that_matters_is_left_out(directory: Path) -> None:
    """Each but the projections, which the score does not use, and what starts at zero gradient, moves the score."""
    reward: Any = load_image_reward(directory)
    parameters = dict(reward.network.named_parameters())
    for one in parameters.values():
        one.requires_grad_(True)
    scores(reward, 0).square().sum().backward()
    still = [name for name, one in parameters.items() if one.grad is None or not one.grad.any()]
    assert still == []
    unused = [name for name in published.image_reward() if "_proj." in name or "position_ids" in name]
    assert len(parameters) == len(published.image_reward()) - len(unused)


def test_a_file_of_its_own_as_safetensors_and_by_name(tmp_path: Path, directory: Path, reward: ImageReward) -> None:
    save_file(published.image_reward(), tmp_path / "renamed.safetensors")
    config = RewardConfig(path=str(tmp_path / "renamed.safetensors"), args={"processor": str(directory)})
    built = build_reward("image_reward", config, torch.device("cpu"))
    assert torch.equal(scores(built, 1), scores(reward, 1))  # type: ignore[arg-type]


def test_half_precision_is_widened(tmp_path: Path) -> None:
    halves = {name: one.half() if one.is_floating_point() else one for name, one in published.image_reward().items()}
    loaded: Any = load_image_reward(save(tmp_path, halves))
    assert {one.dtype for one in loaded.network.parameters()} == {torch.float32}
    assert not any(one.requires_grad for one in loaded.network.parameters())


def test_of_a_caption_that_is_too_long_the_user_is_told_once(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward: Any = load_image_reward(directory)
    long, longer = "a red fox " * 12, "a red fox " * 13  # 38 and 41 tokens, of which 35 are read
    found = reward(image(0).expand(2, -1, -1, -1), [long, longer])
    assert torch.equal(found[0], found[1])
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "a prompt has 38 tokens, and reward 'image_reward' reads the first 35" in said


def test_weights_of_another_reward_are_refused(tmp_path: Path) -> None:
    save(tmp_path, {"visual.conv1.weight": torch.zeros(8, 3, 14, 14), "logit_scale": torch.ones(())})
    with pytest.raises(UserError, match=r"reward.image_reward.path '.*' has not the weights of ImageReward"):
        load_image_reward(tmp_path)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    """As BLIP itself is published, or a training that saved `blip` alone."""
    save(tmp_path, {name: one for name, one in published.image_reward().items() if not name.startswith("mlp.")})
    with pytest.raises(UserError, match=r"10 missing: mlp.layers.0.weight, mlp.layers.0.bias"):
        load_image_reward(tmp_path)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    save(tmp_path, published.image_reward() | {"blip.text_decoder.bias": torch.zeros(2)})
    with pytest.raises(UserError, match=r"1 unknown: blip.text_decoder.bias"):
        load_image_reward(tmp_path)


def test_another_tokenizer_is_refused(directory: Path) -> None:
    words = len(AutoTokenizer.from_pretrained(EMOJI_CLIP)) + 2
    with pytest.raises(UserError, match=rf"has {words:,} tokens, but the network in .* has 34; set reward"):
        load_image_reward(directory, processor=str(EMOJI_CLIP))


def test_offline_it_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for patched in ("checkpoints", "captions"):
        monkeypatch.setattr(f"draftplus.rewards.{patched}.why_offline", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(UserError) as weights:
        load_image_reward()
    assert "hf download zai-org/ImageReward ImageReward.pt --local-dir DIRECTORY" in str(weights.value)
    assert "reward.image_reward.path=DIRECTORY" in str(weights.value)
    torch.save(published.image_reward(), tmp_path / "ImageReward.pt")
    with pytest.raises(UserError) as tokenizer:
        load_image_reward(tmp_path)
    assert str(tokenizer.value) == (
        "reward 'image_reward' needs the tokenizer of 'bert-base-uncased', which is not on this disk, and "
        "HF_HUB_OFFLINE is set.\nRun: hf download bert-base-uncased --local-dir DIRECTORY, on a machine that reaches "
        "it; then reward.image_reward.args.processor=DIRECTORY"
    )


def test_the_published_constants() -> None:
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
