"""Dropout in a reward network: only where a gradient is taken, addressed by image, and the mean is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from draftplus import rng
from draftplus.errors import UserError
from draftplus.rewards.clip import ClipReward, load_clip_reward, load_clip_score, load_emoji_clip, load_pickscore
from draftplus.rewards.dropout import Dropout
from tests.rewards.test_clip_reward import PROMPTS, pictures, save_random

RATE = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_random(tmp_path_factory.mktemp("clip"), size=32, width=32, patch=8)


@pytest.fixture(scope="module")
def noisy(checkpoint: str) -> ClipReward:
    return load_clip_reward(checkpoint, dropout=RATE)


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> ClipReward:
    return load_clip_reward(checkpoint)


def scores(reward: ClipReward, rows: slice = slice(0, 4), step: int = 0, index: int = 0, draws: int = 1) -> Tensor:
    """With gradient, of the images at index … of a step; the last of some draws."""
    images = pictures(32)[rows].requires_grad_()
    with rng.samples(0, step, range(index + rows.start, index + rows.stop)):
        return [reward(images, PROMPTS[rows]) for _ in range(draws)][-1].detach()


def test_what_is_measured_has_no_noise(noisy: ClipReward, plain: ClipReward) -> None:
    images = pictures(32)
    assert torch.equal(noisy(images, PROMPTS), plain(images, PROMPTS)), "images without gradient"
    with torch.no_grad():
        assert torch.equal(noisy(images.clone().requires_grad_(), PROMPTS), plain(images, PROMPTS))
    assert ((scores(noisy) - scores(plain)).abs() > 1e-3).all()


def test_a_rate_of_zero_is_no_dropout(checkpoint: str, plain: ClipReward) -> None:
    assert torch.equal(scores(load_clip_reward(checkpoint, dropout=0.0)), scores(plain))


def test_the_noise_is_a_function_of_step_image_and_draw(noisy: ClipReward) -> None:
    whole = scores(noisy)
    assert torch.equal(scores(noisy), whole)
    parts = torch.cat([scores(noisy, slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-4)  # one image a time, as on another rank
    for other in (scores(noisy, step=1), scores(noisy, index=9), scores(noisy, draws=2)):
        assert ((other - whole).abs() > 1e-3).all()


def test_it_uses_up_nobody_elses_randomness(noisy: ClipReward) -> None:
    before = torch.get_rng_state()
    scores(noisy)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_is_that_of_the_noisy_network(checkpoint: str) -> None:
    reward = load_clip_reward(checkpoint, dtype=torch.float64, dropout=RATE)
    images = (0.2 + 0.6 * pictures(32, 2)).double().requires_grad_()

    def value(at: Tensor) -> Tensor:
        with rng.samples(0, 0, [0, 1]):
            return reward(at, PROMPTS[:2]).sum()

    (gradient,) = torch.autograd.grad(value(images), images)
    along = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    up, down = (value(images + h * along).item() for h in (1e-5, -1e-5))
    assert (gradient * along).sum().item() == pytest.approx((up - down) / 2e-5, rel=1e-5)


class Block(nn.Module):
    """As a transformer layer: attention gives its output in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Pair(), nn.Identity()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def test_it_zeroes_at_its_rate_and_keeps_the_mean() -> None:
    block = Block()
    dropout = Dropout([block], RATE)
    ones = torch.ones(8, 50, 64)
    with rng.samples(0, 0, range(8)), dropout.active(8):
        attention, weights = block.self_attn(ones)
        hidden = block.mlp(ones)
    assert weights is None
    for out in (attention, hidden):
        torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / (1 - RATE)]))
        assert out.mean().item() == pytest.approx(1, abs=0.02)  # 25,600 values: 5 standard errors
        assert (out == 0).float().mean().item() == pytest.approx(RATE, abs=0.015)
        assert out.mean((1, 2)).std() > 0, "another mask for each image"
    assert not torch.equal(attention, hidden)
    assert torch.equal(block.mlp(ones), ones), "it ends with the pass"


@pytest.mark.parametrize("rate", [1, -0.1, float("nan")])
def test_what_is_no_rate_is_refused(checkpoint: str, rate: float) -> None:
    for load in (load_emoji_clip, load_pickscore, load_clip_score):
        name = load.__name__.removeprefix("load_")
        with pytest.raises(UserError, match=f"'{name}': args.dropout is {rate}; it must be at least 0 and less than 1"):
            load(checkpoint, dropout=rate)


def test_all_of_clips_shape_take_it(checkpoint: str) -> None:
    for load in (load_emoji_clip, load_pickscore, load_clip_score):
        images = pictures(32).requires_grad_()
        noisy, plain = (load(checkpoint, dropout=rate)(images, PROMPTS) for rate in (RATE, 0.0))
        assert not torch.equal(noisy, plain)
