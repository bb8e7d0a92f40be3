"""HPSv3 against the package that it was published with, which `tests/parity/originals/hpsv3.py` ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.hpsv3 import load_hpsv3, patched, renamed, resized
from draftplus.rewards.hpsv3_instruction import TEMPLATE
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, preprocess
from tests.support import published
from tests.support.published import HPSV3_PROMPTS as PROMPTS

ORIGINAL = json.loads((Path(__file__).parents[1] / "parity" / "originals" / "hpsv3.json").read_text())
RANGE = max(map(max, ORIGINAL["scores"])) - min(map(min, ORIGINAL["scores"]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.save_hpsv3(tmp_path_factory.mktemp("hpsv3"))


@pytest.fixture(scope="module")
def reward(directory: Path) -> Any:
    return load_hpsv3(directory)


def image(number: int) -> Tensor:
    return torch.from_numpy(published.hpsv3_pictures()[number]).permute(2, 0, 1)[None] / 255


def scores(reward: Any, number: int, count: int = len(PROMPTS)) -> Tensor:
    with torch.no_grad():
        return reward(image(number).expand(count, -1, -1, -1), PROMPTS[:count])


def test_scores_are_the_original_packages(reward: Any) -> None:
    """Of a picture that is not resized to 1e-5 of their range; of those that the original resizes to 8 bits to 1e-2."""
    assert [tuple(size) for size in ORIGINAL["sizes"]] == published.HPSV3_SIZES
    for number, expected in enumerate(ORIGINAL["scores"]):
        found = scores(reward, number)
        assert found.shape == (len(expected),) and found.dtype == torch.float32
        assert (found - torch.tensor(expected)).abs().max() < (1e-5 if number == 0 else 1e-2) * RANGE


def test_what_is_read_is_the_original_packages(reward: Any) -> None:
    assert ORIGINAL["text"] == TEMPLATE
    ids = reward._with_picture(reward._tokens(PROMPTS[0]), 256)
    assert ids.tolist() == ORIGINAL["tokens"]
    assert (ids == reward.read).sum() == 1 and (ids == reward.image).sum() == 256


def test_sizes_are_the_original_packages() -> None:
    found = [[1, *(side // 14 for side in resized(*size, 28))] for size in published.HPSV3_SIZES]
    assert found == ORIGINAL["grids"]
    assert resized(448, 448, 28) == (448, 448) and resized(1024, 1024, 28) == (448, 448)


def test_patches_are_those_of_the_stock_processor() -> None:
    """Of today's transformers, in every number; and of the original's in a sample of them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    picture = published.hpsv3_pictures()[0][:, :392]
    spec = Preprocessing(None, "bicubic", None, 1.0, CLIP_MEAN, CLIP_STD)
    pixels = preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, spec)
    stock = Qwen2VLImageProcessorPil()(np.ascontiguousarray(picture), return_tensors="pt")
    assert stock.image_grid_thw.tolist() == [[1, 32, 28]]
    torch.testing.assert_close(patched(pixels, 14, 2, 2), stock.pixel_values, atol=1e-5, rtol=0)
    sample = patched(preprocess(image(0), spec), 14, 2, 2)[::97, ::101]
    torch.testing.assert_close(sample, torch.tensor(ORIGINAL["pixels"]), atol=1e-5, rtol=0)


def test_patches_of_several_pictures_are_those_of_each() -> None:
    pixels = torch.rand(3, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([patched(one[None], 14, 2, 2) for one in pixels])
    assert torch.equal(patched(pixels, 14, 2, 2), alone) and alone.shape == (3 * 24, 3 * 2 * 14 * 14)


def test_the_published_layout(directory: Path) -> None:
    """Names, shapes and dtypes of the file are those that the original's network has, nothing around them."""
    tensors = load_file(directory / "HPSv3.safetensors")
    assert {name: [list(one.shape), str(one.dtype)] for name, one in tensors.items()} == ORIGINAL["names"]


def test_the_published_sizes() -> None:
    """Those that a report of the original's names (github.com/MizzenAI/HPSv3, issue 15), and 8.3 billion in all."""
    shapes = published.true_size_hpsv3_shapes()
    assert shapes["visual.merger.mlp.2.weight"] == (3584, 5120)
    assert shapes["model.embed_tokens.weight"] == (151658, 3584)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (512, 3584)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(8.29e9, rel=1e-3)


def test_a_file_that_later_transformers_wrote(tmp_path: Path, reward: Any) -> None:
    """The original's newer program names the tensors otherwise."""
    published.save_hpsv3(tmp_path, renamed(published.hpsv3()))
    assert torch.equal(scores(load_hpsv3(tmp_path), 4, 1), scores(reward, 4, 1))


def test_the_gradient_agrees_with_finite_differences(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, also where transformers computes in float32 whatever it is given; the picture is resized."""
    published.in_double(monkeypatch.setattr)
    reward = load_hpsv3(directory, dtype=torch.float64)
    pixels = (0.2 + 0.6 * image(4).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, ["a red fox"]).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        above, below = (reward(pixels + sign * step * direction, ["a red fox"]).sum() for sign in (1, -1))
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=0)


def test_in_float32_the_gradient_is_that_of_float64(directory: Path, reward: Any) -> None:
    gradients = []
    for one, dtype in ((reward, torch.float32), (load_hpsv3(directory, dtype=torch.float64), torch.float64)):
        pixels = image(0).to(dtype).requires_grad_()
        gradients += [*torch.autograd.grad(one(pixels, ["a red fox"]).sum(), pixels)]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0, atol=1e-4 * gradients[1].abs().max().item())


def test_a_picture_does_not_depend_on_those_beside_it(reward: Any) -> None:
    """Though prompts of other lengths pad it."""
    together = scores(reward, 4)
    with torch.no_grad():
        alone = torch.cat([reward(image(4), [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(alone, together, atol=1e-5 * RANGE, rtol=0)


def test_in_bfloat16_it_is_the_original_package_up_to_rounding(directory: Path) -> None:
    """Which moves the original's scores themselves by 4% of their range."""
    config = RewardConfig(path=str(directory), args={"bfloat16": True})
    reward: Any = build_reward("hpsv3", config, torch.device("cpu"))
    kinds = {str(one.dtype) for name, one in reward.network.state_dict().items() if not name.startswith("rm_head.")}
    assert kinds == {"torch.bfloat16"}
    for name, one in reward.network.rm_head.state_dict().items():
        assert torch.equal(one, published.hpsv3()[f"rm_head.{name}"])
    found = scores(reward, 0)
    assert found.dtype == torch.float32
    assert (found - torch.tensor(ORIGINAL["bfloat16"][0])).abs().max() < 0.05 * RANGE


def test_the_authors_rounded_positions_matter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact ones the scores are others than the original's, so that the test above would see it."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.float())
    exact = scores(load_hpsv3(directory), 0)
    assert (exact - torch.tensor(ORIGINAL["scores"][0])).abs().max() > 1e-3 * RANGE


def test_weights_without_the_head_are_refused(tmp_path: Path) -> None:
    """As of a plain Qwen2-VL."""
    plain = {name: one for name, one in published.hpsv3().items() if not name.startswith("rm_head.")}
    published.save_hpsv3(tmp_path, plain)
    with pytest.raises(UserError, match=r"reward.hpsv3.path '.*' has not the weights of HPSv3: .* its head rm_head"):
        load_hpsv3(tmp_path)


def test_weights_of_another_reward_are_refused(tmp_path: Path) -> None:
    published.save_hpsv3(tmp_path)
    save_file(published.mps(), tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match="has not the weights of HPSv3: they are another model's"):
        load_hpsv3(tmp_path)


def test_incomplete_weights_and_other_sizes_are_refused(tmp_path: Path) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    published.save_hpsv3(tmp_path, {name: one for name, one in published.hpsv3().items() if name != lost})
    with pytest.raises(UserError, match=r"1 missing: model.language_model.layers.1.mlp.down_proj.weight"):
        load_hpsv3(tmp_path)
    published.save_hpsv3(tmp_path, published.hpsv3() | {"rm_head.5.weight": torch.zeros(1, 16)})
    with pytest.raises(UserError, match=r"of another shape: rm_head.5.weight \(1, 16\), not \(2, 16\)"):
        load_hpsv3(tmp_path)


def test_a_processor_that_is_not_the_networks(tmp_path: Path, directory: Path) -> None:
    published.save_hpsv3(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"no config.json of a Qwen2-VL: set reward.hpsv3.args.processor"):
        load_hpsv3(tmp_path)
    words = published.hpsv3()
    words["model.embed_tokens.weight"] = torch.zeros(999, 64).bfloat16()
    save_file(words, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"tokens, but the network in .* has 999; set reward.hpsv3.args.processor"):
        load_hpsv3(tmp_path, processor=str(directory))


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>"])
def test_a_prompt_with_the_networks_own_token_is_refused(reward: Any, token: str) -> None:
    with pytest.raises(UserError, match=r"cannot score a prompt that has its own token <\|"):
        reward(image(4), [f"a cat {token}"])


def test_a_picture_that_is_too_slender_is_refused(reward: Any) -> None:
    with pytest.raises(UserError, match="cannot score pictures of 1 × 201"):
        reward(torch.zeros(1, 3, 1, 201), ["a cat"])


def test_offline_it_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for patched_module in ("checkpoints", "captions"):
        monkeypatch.setattr(f"draftplus.rewards.{patched_module}.why_offline", lambda: "HF_HUB_OFFLINE is set")
    with pytest.raises(UserError, match=r"hf download MizzenAI/HPSv3 HPSv3.safetensors .* reward.hpsv3.path=DIRECTORY"):
        load_hpsv3()
    save_file(published.hpsv3(), tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2-VL-7B-Instruct .* reward.hpsv3.args.processor"):
        load_hpsv3(tmp_path)
