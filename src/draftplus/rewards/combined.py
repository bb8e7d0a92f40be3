"""Several weighted rewards as one, and the checks that every reward's output passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from draftplus.errors import UserError, needs_memory
from draftplus.types import Reward, Scores

Term = TypeVar("Term", Tensor, float)


class Scale(NamedTuple):
    """A reward's mean and standard deviation over some pictures, by which it is scaled."""

    mean: float
    deviation: float


class Combined:
    """The weighted sum of rewards by name, a Scorer. It is differentiable if all of them are, and compares images if
    any of them does.

    rewards: {name: (reward, weight)}, not empty. scales: of those that are in the sum as their weight times
    (score - mean) / deviation. Each reward is called once and its output checked; numbers that are
    not finite pass, and the caller decides what to do about them. Where an image is not finite, rewards see black ones
    in place of the batch, and all its scores are NaN.
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]], scales: Mapping[str, Scale] | None = None) -> None:
        if not rewards:
            raise UserError("no reward given: name one, for example reward=emoji_clip")
        self.rewards, self.scales = dict(rewards), dict(scales or {})
        self.differentiable = all(reward.differentiable for reward, _ in self.rewards.values())
        self.compares_images = any(getattr(reward, "compares_images", False) for reward, _ in self.rewards.values())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns total and parts, all (b,), the parts as the
        rewards gave them, detached. UserError for a reward that returns anything but b floating-point scores on the
        images' device, or claims to be differentiable and returns scores without gradient to the images."""
        total = images.new_zeros(len(images), dtype=torch.promote_types(images.dtype, torch.float32))  # (b,)
        # no reward's doing, and any of them may fail on it; an `if` would wait for the device
        finite = images.isfinite().all()
        seen = images.where(finite, 0)
        parts = {}
        for name, (reward, _) in self.rewards.items():
            with needs_memory(f"reward '{name}' of {len(images)} images"):
                scores = _checked(name, reward(seen, prompts), images).where(finite, torch.nan)
            if reward.differentiable and torch.is_grad_enabled() and images.requires_grad:
                _require_gradient(name, scores, images)
            total = total + self.term(name, scores)
            parts[name] = scores.detach()
        return Scores(total, parts)

    def term(self, name: str, score: Term) -> Term:
        """A score's part of the sum."""
        weight, scale = self.rewards[name][1], self.scales.get(name)
        return weight * (score if scale is None else (score - scale.mean) / scale.deviation)

    def total(self, scores: Mapping[str, float]) -> float:
        """The sum of scores by name, or of their means; those of other names do not count."""
        return sum(self.term(name, scores[name]) for name in self.rewards)


def _checked(name: str, scores: object, images: Tensor) -> Tensor:
    expected = f"expected a floating-point tensor of shape ({len(images)},), one score per image"
    if not isinstance(scores, Tensor):
        raise UserError(f"reward '{name}' returned {type(scores).__name__}: {expected}.")
    if scores.shape != (len(images),):
        raise UserError(f"reward '{name}' returned scores of shape {tuple(scores.shape)}: {expected}.")
    if not scores.is_floating_point():
        raise UserError(f"reward '{name}' returned scores of type {scores.dtype}: {expected}.")
    if scores.device != images.device:
        raise UserError(
            f"reward '{name}' returned scores on {scores.device}, but the images are on {images.device}: "
            "return them on the images' device."
        )
    return scores


def _require_gradient(name: str, scores: Tensor, images: Tensor) -> None:
    # requires_grad of the scores is not enough: with unfrozen weights a reward has a gradient even if the images were
    # detached on the way, so the autograd graph is searched for the images
    target = get_gradient_edge(images).node
    seen, stack = set(), [scores.grad_fn]
    while stack:
        node = stack.pop()
        if node is target:
            return
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    raise UserError(
        f"the scores of reward '{name}' carry no gradient: they may pass through PIL, uint8, NumPy or no_grad.\n"
        "Use torch operations only, or set differentiable = False to measure the reward without training on it."
    )
