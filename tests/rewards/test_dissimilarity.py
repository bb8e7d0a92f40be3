"""Dissimilarity in closed form, and what it says where there is nothing to compare with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftplus.errors import UserError
from draftplus.rewards.combined import Combined
from draftplus.rewards.dissimilarity import Dissimilarity, load_dissimilarity
from tests.rewards.test_clip_reward import pictures


def directions(images: Tensor) -> Tensor:
    """Features of an image: its first two pixels, as a direction."""
    return torch.nn.functional.normalize(images.flatten(1)[:, :2], dim=-1)


def pointing(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    images = torch.zeros(len(degrees), 3, 2, 2, dtype=torch.float64)
    images[:, 0, 0] = torch.stack([angles.cos(), angles.sin()], 1)
    return images


def test_mean_of_one_minus_cosine_to_the_others() -> None:
    scores = Dissimilarity(directions)(pointing(0, 60, 90), ["a", "b", "a"])
    half, root = 0.5, 3**0.5 / 2
    expected = [(1 - half + 1 - 0) / 2, (1 - half + 1 - root) / 2, (1 - 0 + 1 - root) / 2]
    assert scores.tolist() == pytest.approx(expected)


def test_with_images_of_the_same_prompt_only() -> None:
    scores = Dissimilarity(directions, same_prompt=True)(pointing(0, 60, 90, 60), ["a", "b", "a", "b"])
    assert scores.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-12)


def test_gradient_equals_finite_differences_in_all_images() -> None:
    reward, images = Dissimilarity(directions), pointing(0, 30, 80).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, ["a", "b", "a"]), images)
    (gradient,) = torch.autograd.grad(reward(images, ["a", "b", "a"])[0], images)
    assert all(part.abs().sum() > 0 for part in gradient), "the first one's score depends on all"


@pytest.mark.parametrize("same_prompt", [False, True])
def test_one_image_alone(same_prompt: bool) -> None:
    with pytest.raises(UserError, match=r"has a single image; set train\.micro_batch_size to 2 or more"):
        Dissimilarity(directions, same_prompt)(pointing(0), ["a"])


def test_one_image_of_its_prompt() -> None:
    with pytest.raises(UserError, match=r"only one image of 'b' in a micro-batch of 3; set data\.images_per_prompt"):
        Dissimilarity(directions, same_prompt=True)(pointing(0, 10, 20), ["a", "b", "a"])


def test_in_the_embedded_feature_space() -> None:
    reward = load_dissimilarity()
    images = pictures(64, 3)
    scores = reward(images, ["a", "b", "a"])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and (scores > 1e-4).all() and (scores < 2).all()
    assert reward(images[:1].repeat(3, 1, 1, 1), ["a"] * 3).abs().max() < 1e-5
    leaf = images.requires_grad_()
    Combined({"dissimilarity": (reward, 2.0)})(leaf, ["a", "b", "a"]).total.sum().backward()
    assert all(part.abs().sum() > 0 for part in leaf.grad)
