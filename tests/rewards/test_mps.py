"""MPS against a port of the authors' program, imscore's, which `tests/parity/originals/mps.py` ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.mps import CONDITION, Mps, load_mps
from tests.support import published

ORIGINAL = json.loads((Path(__file__).parents[1] / "parity" / "originals" / "mps.json").read_text())
RANGE = max(map(max, ORIGINAL["scores"])) - min(map(min, ORIGINAL["scores"]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.save_mps(tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="module")
def reward(directory: Path) -> Mps:
    return load_mps(directory)  # type: ignore[return-value]


def image(number: int) -> Tensor:
    return torch.from_numpy(published.pictures()[number]).permute(2, 0, 1)[None] / 255


def scores(reward: Any, number: int) -> Tensor:
    return reward(image(number).expand(len(published.PROMPTS), -1, -1, -1), published.PROMPTS)


def test_scores_are_the_original_programs(reward: Mps) -> None:
    """Pictures of the network's size to 1e-5 of the range; those that the original resizes to 8 bits to 1e-2."""
    assert [tuple(size) for size in ORIGINAL["sizes"]] == published.SIZES
    for number, expected in enumerate(ORIGINAL["scores"]):
        found = scores(reward, number)
        assert found.shape == (len(expected),) and found.dtype == torch.float32
        assert (found - torch.tensor(expected)).abs().max() < (1e-5 if number == 0 else 1e-2) * RANGE


def test_tokens_and_condition_are_the_original_programs(reward: Mps) -> None:
    for prompt, expected in zip(published.PROMPTS, ORIGINAL["tokens"], strict=True):
        assert reward.captions(prompt)[0].tolist() == expected
    assert ORIGINAL["condition"] == CONDITION


def test_the_condition_decides_which_words_are_read(reward: Mps) -> None:
    """Of these prompts some tokens are read and some are not, and another condition reads others."""
    read = torch.stack([reward._text(prompt)[1] for prompt in published.PROMPTS])
    assert 0 < read.float().mean() < 1
    other = Mps(reward.network, reward.captions, reward.preprocessing)
    other._condition = -reward._condition  # type: ignore[operator]
    assert not torch.equal(torch.stack([other._text(prompt)[1] for prompt in published.PROMPTS]), read)


@pytest.mark.parametrize("number", [0, 1])
def test_the_gradient_agrees_with_finite_differences(directory: Path, number: int) -> None:
    reward = load_mps(directory, dtype=torch.float64)
    pixels = image(number).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(pixels, ["a red fox"]).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        above, below = (reward(pixels + sign * step * direction, ["a red fox"]).sum() for sign in (1, -1))
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=0)


def test_a_prompt_does_not_depend_on_those_beside_it(directory: Path) -> None:
    """Not in the last bit, though the original scales by the greatest similarity of the batch."""
    reward: Any = load_mps(directory)
    together = scores(reward, 1)
    fresh: Any = load_mps(directory)
    for prompt, expected in zip(reversed(published.PROMPTS), reversed(together), strict=True):
        torch.testing.assert_close(fresh(image(1), [prompt])[0], expected, atol=1e-5, rtol=0)
        assert all(torch.equal(*one) for one in zip(fresh._text(prompt), reward._text(prompt), strict=True))


def test_a_state_dict_of_the_authors_program(tmp_path: Path, directory: Path, reward: Mps) -> None:
    """Without the converter's prefix, in half precision, with the buffers of the transformers of then."""
    tensors = {name.removeprefix("mps."): one for name, one in published.mps().items()}
    row = {f"model.{tower}_model.embeddings.position_ids": torch.arange(77)[None] for tower in ("text", "vision")}
    torch.save(tensors | row, tmp_path / "MPS_overall_checkpoint.pth")
    config = RewardConfig(path=str(tmp_path / "MPS_overall_checkpoint.pth"), args={"processor": str(directory)})
    assert torch.equal(scores(build_reward("mps", config, torch.device("cpu")), 0), scores(reward, 0))
    torch.save({name: one.half() for name, one in tensors.items()}, tmp_path / "half.pth")
    half: Any = load_mps(tmp_path / "half.pth", processor=str(directory))
    assert {one.dtype for one in half.network.state_dict().values()} == {torch.float32}


class Program(torch.nn.Linear):
    """Stands for the class that the authors' pickle names."""


def test_the_authors_own_file_is_refused(tmp_path: Path) -> None:
    torch.save(Program(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(UserError, match="would run code"):
        load_mps(tmp_path / "MPS_overall_checkpoint.pth")


def test_weights_of_another_reward_and_without_a_head_are_refused(tmp_path: Path) -> None:
    """As PickScore's: a CLIP and nothing else."""
    published.save_mps(tmp_path, {name: one for name, one in published.mps().items() if ".cross_model." not in name})
    with pytest.raises(UserError, match=r"reward.mps.path '.*' has not the weights of MPS: no tensor's name begins"):
        load_mps(tmp_path)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    lost = "mps.cross_model.layers.1.1.fn.attn_out.weight"
    published.save_mps(tmp_path, {name: one for name, one in published.mps().items() if name != lost})
    with pytest.raises(UserError, match=r"1 missing: cross_model.layers.1.1.fn.attn_out.weight"):
        load_mps(tmp_path)


def test_a_network_that_the_processor_does_not_describe(tmp_path: Path) -> None:
    published.save_mps(tmp_path)
    larger = published.MPS_CONFIG | {"projection_dim": 192}
    (tmp_path / "config.json").write_text(json.dumps(larger))
    with pytest.raises(UserError, match="of another shape"):
        load_mps(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json of a CLIP: set reward.mps.args.processor"):
        load_mps(tmp_path)


def test_of_a_caption_that_is_too_long_the_user_is_told(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reward: Any = load_mps(directory)
    long = "a red fox on a blue background " * 12
    found = reward(image(0).expand(2, -1, -1, -1), [long, long + "and a zebra"])
    assert torch.equal(found[0], found[1])
    assert "reward 'mps' reads the first 77; its end" in capfd.readouterr().err


def test_offline_it_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for patched in ("checkpoints", "captions"):
        monkeypatch.setattr(f"draftplus.rewards.{patched}.why_offline", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(UserError, match=r"hf download RE-N-Y/mpsv1 model.safetensors .* reward.mps.path=DIRECTORY"):
        load_mps()
    save_file(published.mps(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"hf download laion/CLIP-ViT-H-14.* reward.mps.args.processor=DIRECTORY"):
        load_mps(tmp_path)
