"""Several rewards as one: sums, flags, and what is refused."""

import pytest
import torch
from torch import nn

from draftplus.errors import UserError
from draftplus.rewards.combined import Combined

PROMPTS = ["a cat", "a dog", "a cow"]


class Brightness:
    differentiable = True

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Contrast:
    differentiable = True

    def __call__(self, images, prompts):
        return images.flatten(1).std(dim=1)


class Fake:
    """Returns what it is told to."""

    def __init__(self, function, differentiable=True):
        self.function, self.differentiable = function, differentiable

    def __call__(self, images, prompts):
        return self.function(images)


@pytest.fixture
def images():
    return torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_total_is_the_weighted_sum_and_so_is_its_gradient(images):
    scorer = Combined({"brightness": (Brightness(), 2.0), "contrast": (Contrast(), -0.5)})
    scores = scorer(images, PROMPTS)
    expected = 2 * images.mean(dim=(1, 2, 3)) - 0.5 * images.flatten(1).std(dim=1)
    torch.testing.assert_close(scores.total, expected)
    ours, theirs = (torch.autograd.grad(total.sum(), images)[0] for total in (scores.total, expected))
    torch.testing.assert_close(ours, theirs)
    assert list(scores.parts) == ["brightness", "contrast"]
    torch.testing.assert_close(scores.parts["contrast"], Contrast()(images, PROMPTS).detach())
    assert not any(part.requires_grad for part in scores.parts.values())


def test_differentiable_only_if_all_are():
    assert Combined({"a": (Brightness(), 1.0)}).differentiable
    assert not Combined({"a": (Brightness(), 1.0), "b": (Fake(None, differentiable=False), 1.0)}).differentiable


def test_no_reward_is_refused():
    with pytest.raises(UserError, match="no reward"):
        Combined({})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.mean(), r"'bad' returned scores of shape \(\).*\(3,\)"),
        (lambda x: x.mean(dim=(1, 2, 3))[:, None], r"shape \(3, 1\).*\(3,\)"),
        (lambda x: x.mean(dim=(1, 2, 3))[:1], r"shape \(1,\).*\(3,\)"),
        (lambda x: x.detach().mean(dim=(1, 2, 3)).long(), "torch.int64.*floating"),
        (lambda x: [0.0, 0.0, 0.0], "returned list"),
        (lambda x: torch.zeros(3, device="meta"), "on meta, but the images are on cpu"),
    ],
)
def test_wrong_output_is_refused(images, function, words):
    with pytest.raises(UserError, match=words):
        Combined({"good": (Brightness(), 1.0), "bad": (Fake(function), 1.0)})(images, PROMPTS)


@pytest.mark.parametrize("function", [lambda x: torch.from_numpy(x.detach().numpy()).mean(dim=(1, 2, 3))])
def test_claimed_gradient_that_is_not_there_is_refused(images, function):
    with pytest.raises(UserError, match=r"'bad' carry no gradient(.|\n)*differentiable"):
        Combined({"bad": (Fake(function), 1.0)})(images, PROMPTS)


def test_gradient_to_the_reward_s_own_weights_does_not_count(images):
    layer = nn.Linear(192, 1).double()
    broken = Fake(lambda x: layer(x.detach().flatten(1))[:, 0])
    assert broken(images, PROMPTS).requires_grad
    with pytest.raises(UserError, match="carry no gradient"):
        Combined({"bad": (broken, 1.0)})(images, PROMPTS)
    Combined({"good": (Fake(lambda x: layer(x.flatten(1))[:, 0]), 1.0)})(images, PROMPTS)


def test_images_that_come_out_of_a_decoder_are_found_in_the_graph():
    latents = torch.rand(3, 3, 8, 8, requires_grad=True)
    images = (2 * latents).clamp(0, 1)
    Combined({"good": (Contrast(), 1.0)})(images, PROMPTS)
    with pytest.raises(UserError, match="carry no gradient"):  # gradient, but around the images
        Combined({"bad": (Fake(lambda x: latents.mean(dim=(1, 2, 3))), 1.0)})(images, PROMPTS)


def test_no_gradient_is_asked_for_where_none_is_wanted(images):
    silent = Fake(lambda x: x.detach().mean(dim=(1, 2, 3)))
    with torch.no_grad():
        Combined({"silent": (silent, 1.0)})(images, PROMPTS)
    Combined({"silent": (silent, 1.0)})(images.detach(), PROMPTS)
    Combined({"honest": (Fake(silent.function, differentiable=False), 1.0)})(images, PROMPTS)


def test_scores_that_are_not_finite_pass(images):
    scores = Combined({"nan": (Fake(lambda x: x.mean(dim=(1, 2, 3)) * float("nan")), 1.0)})(images, PROMPTS)
    assert scores.total.isnan().all()
