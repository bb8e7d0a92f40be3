"""Rewards as a user would write them, good and bad; named in configurations as `tests.support.rewards:...`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How much red there is beyond green and blue; smooth, and strong enough for a tiny model."""
    return 100 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def paleness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Falls as redness rises."""
    return -redness(images, prompts)


def brightness(images: Tensor, prompts: Sequence[str], gain: float = 100.0) -> Tensor:
    return gain * images.mean((1, 2, 3))


def affine(images: Tensor, prompts: Sequence[str], gain: float = 1.0, offset: float = 0.0) -> Tensor:
    """Redness in another unit, from another zero."""
    return gain * redness(images, prompts) + offset


def constant(images: Tensor, prompts: Sequence[str], value: float = 0.5) -> Tensor:
    """The same for all images, with a gradient of zero."""
    return value + 0 * images.mean((1, 2, 3))


def by_prompt(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Another weighting of the colours for every prompt, so that a score against the wrong one shows."""
    numbers = [sum(map(ord, prompt)) for prompt in prompts]
    weights = images.new_tensor([[n % 5, n % 7, n % 11] for n in numbers])
    return 10 * (images.mean((2, 3)) * weights).sum(1)


def detached(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return redness(images.detach(), prompts)


def wrong_shape(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return redness(images, prompts)[:, None]


def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
    raise ZeroDivisionError("of the user's own code")


def measured_only(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return redness(images.detach(), prompts)


measured_only.differentiable = False  # type: ignore[attr-defined]


def spread(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How far an image is from the mean of those that are scored with it."""
    return 100 * (images - images.mean(0)).square().mean((1, 2, 3))


spread.compares_images = True  # type: ignore[attr-defined]


class Shade(torch.nn.Module):
    """How alike an image's colours are to those of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("colour", torch.tensor([1.0, -0.5, -0.5]))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * (images.mean((2, 3)) * self.colour).sum(1)


class Flaky:
    """Redness that is not finite at some of its calls with gradient, counted from 0.

    In the loss, or (`where="gradient"`) only in its derivative, as of a square root at 0.
    """

    def __init__(self, bad: Sequence[int] = (), where: str = "loss") -> None:
        self.bad, self.where = set(bad), where
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = redness(images, prompts)
        if not torch.is_grad_enabled():
            return scores
        self.calls += 1
        if self.calls - 1 not in self.bad:
            return scores
        if self.where == "gradient":
            return scores + (images * 0).sum((1, 2, 3)).sqrt()
        return scores * float("nan")


class NanAt:
    """Redness without gradient, not finite at some of its calls, counted from 0 over training and evaluation."""

    differentiable = False

    def __init__(self, bad: Sequence[int]) -> None:
        self.bad, self.calls = set(bad), 0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls += 1
        return redness(images.detach(), prompts) * (float("nan") if self.calls - 1 in self.bad else 1.0)


def always_nan(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return redness(images, prompts) * float("nan")


def patient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; waits for as long as a file says so in the working directory, in training or in evaluation.

    "hold-at" names a number of steps: with that many taken, training waits.
    """
    when = "training" if torch.is_grad_enabled() else "evaluation"
    hold, metrics = Path("hold-at"), Path("runs/run/metrics.jsonl")
    held = hold.exists() and metrics.exists() and len(metrics.read_text().splitlines()) >= int(hold.read_text())
    if held or Path(f"wait-in-{when}").exists():
        Path("waiting").touch()
        time.sleep(600)
    return redness(images, prompts)


SEEN: list[tuple[bool, str]] = []  # whether there was a gradient, and the prompt


def recorded(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness that notes what it was asked to score."""
    SEEN.extend((torch.is_grad_enabled(), prompt) for prompt in prompts)
    return redness(images, prompts)


CALLS: list[int] = []


def breakable(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; raises in the training step after as many as "break-at" in the working directory names."""
    if torch.is_grad_enabled():
        if Path("break-at").exists() and len(CALLS) == int(Path("break-at").read_text()):
            raise ZeroDivisionError("of the user's own code")
        CALLS.append(len(prompts))
    return redness(images, prompts)


def held(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; from its third step on, a process waits for as long as a file "hold" is in the working directory."""
    if torch.is_grad_enabled():
        while Path("hold").exists() and len(CALLS) >= 2:
            time.sleep(0.05)
        CALLS.append(len(prompts))
    return redness(images, prompts)


def stubborn(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`patient`, which takes as long to clean up when it is interrupted."""
    try:
        return patient(images, prompts)
    finally:
        if Path("waiting").exists():
            Path("cleaning").touch()
            time.sleep(600)


def flat(images: Tensor, prompts: Sequence[str], slope: float = 0.0) -> Tensor:
    """Differentiable, and the same for every image, or all but the same."""
    return images.mean((1, 2, 3)) * slope + 1
