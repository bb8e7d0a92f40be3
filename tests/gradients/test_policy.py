"""DDPO's loss against the paper's formulas with stock modules, torch.distributions, and finite differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from draftplus.config import ObjectiveConfig
from draftplus.config.objective import DdpoConfig
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.policy import (
    StepLoss,
    Trajectory,
    normalized_advantages,
    rollout,
    step_loss,
)
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.sampler import Sampler
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import ddim_deviation, make_solver, random_steps
from draftplus.distributed import Offload
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.types import Conditioning, Raw
from tests.gradients.by_hand import ByHand, Theta
from tests.tiny import (
    CPU,
    PROMPTS,
    SCHEDULER,
    TinyScorer,
    gradients,
    noise_source,
    normal,
    problem,
    randomize,
    tiny_model,
)

TOTAL = 4
ETA = 0.8
CLIP = 2e-3
ADVANTAGES = torch.tensor([1.5, -0.7, 2.0], dtype=torch.float64)
KL = {"plain": (0.0, "noise"), "kl": (3.0, "noise"), "kl-x0": (3.0, "x0")}


def setting(model: StableDiffusion, penalty: str = "plain", **more: object) -> Problem:
    coeff, space = KL[penalty]
    objective = ObjectiveConfig("ddpo", "all", kl_coeff=coeff, kl_space=space, ddpo=DdpoConfig(clip=CLIP))
    return problem(model, objective, TOTAL, eta=ETA, **more)  # type: ignore[arg-type]


def leaves(model: StableDiffusion) -> dict[str, Tensor]:
    return {name.replace(".default", ""): p.detach().clone() for name, p in model.tuned.trainable().items()}


def losses(made: Problem, trajectory: Trajectory) -> list[StepLoss]:
    conditioning, planned = made.model.encode(PROMPTS), plan(made.objective, made.sampler.schedule, 0, 0)
    assert len(planned.window.steps) == trajectory.log_probs.shape[1]
    return [step_loss(made, planned, trajectory, index, conditioning, ADVANTAGES) for index in planned.window.steps]


class Moved:
    """A model that has moved since its rollouts, so that ratios are not 1 and some of them are clipped."""

    def __init__(self, path: Path) -> None:
        self.model = tiny_model(path)
        randomize(self.model)
        self.bar = leaves(self.model)
        made = setting(self.model)
        self.trajectory = rollout(made, self.model.encode(PROMPTS), noise_source(3))
        self.first = torch.stack([part.ratios for part in losses(made, self.trajectory)])
        for seed, parameter in enumerate(self.model.tuned.trainable().values()):
            parameter.data += 0.004 * normal(*parameter.shape, seed=seed)
        self.theta = leaves(self.model)
        self.hand = ByHand(path, PROMPTS, TinyScorer().scores, noise_source(3), total=TOTAL)

    def log_probs(self, weights: Theta, i: int) -> Tensor:
        """Of what was drawn at step i, with given weights: DDIM's equations 12 and 16."""
        xs = self.hand.trajectory(self.bar, ETA)
        _, here, after = self.hand.level(i)
        deviation = ETA * sqrt((1 - after) / (1 - here)) * sqrt(1 - here / after)
        x0, eps = self.hand.split(self.hand.predict(weights, xs[i], i), xs[i], i)
        mean = sqrt(after) * x0 + sqrt(1 - after - deviation**2) * eps
        return Normal(mean, deviation).log_prob(xs[i + 1]).mean((1, 2, 3))

    def objective(self, theta: Theta, penalty: str) -> Tensor:
        """DDPO's loss at theta, the trajectories being those of `bar`; a mean over steps and images."""
        coeff, space = KL[penalty]
        terms, visits = [], []
        weights = self.hand.weights(theta)
        for i in range(TOTAL):
            with torch.no_grad():
                old = self.log_probs(self.hand.weights(self.bar), i)
            ratio = torch.exp(self.log_probs(weights, i) - old)
            for r, a in zip(ratio, ADVANTAGES, strict=True):  # the cases of the minimum, spelled out
                clipped = (r > 1 + CLIP) if a > 0 else (r < 1 - CLIP)
                limit = 1 + CLIP if a > 0 else 1 - CLIP
                terms.append(-a * limit * torch.ones_like(r) if clipped else -a * r)
            x = self.hand.trajectory(self.bar, ETA)[i]
            if coeff:
                visits.append((self.hand.predict(weights, x, i), x, i))
        value = torch.stack(terms).mean()
        return value + coeff * self.hand.kl(visits, space) if coeff else value


@pytest.fixture(scope="module")
def moved(tiny_path: Path) -> Iterator[Moved]:
    yield Moved(tiny_path)


def test_the_first_ratio_is_one(moved: Moved) -> None:
    assert moved.first.shape == (TOTAL, 3)
    assert (moved.first - 1).abs().max() < 1e-6


def test_the_first_ratio_is_one_in_float32(tiny_path: Path) -> None:
    model = tiny_model(tiny_path, torch.float32)
    randomize(model)
    made = setting(model)
    parts = losses(made, rollout(made, model.encode(PROMPTS), lambda s, d: noise_source(3)(s, d).float()))
    assert max((part.ratios - 1).abs().max().item() for part in parts) < 1e-6


def test_rollouts_are_the_samplers_and_their_probabilities_those_of_torch(moved: Moved) -> None:
    expected = moved.hand.trajectory(moved.bar, ETA)
    torch.testing.assert_close(moved.trajectory.latents, torch.stack(expected, 1), rtol=1e-9, atol=1e-11)
    found = moved.trajectory.log_probs
    with torch.no_grad():
        for i in range(TOTAL):
            by_hand = moved.log_probs(moved.hand.weights(moved.bar), i)
            torch.testing.assert_close(found[:, i], by_hand, rtol=1e-9, atol=1e-10)
    assert not moved.trajectory.latents.requires_grad and not found.requires_grad


@pytest.mark.parametrize("penalty", KL)
def test_loss_and_gradient_equal_an_independent_computation(moved: Moved, penalty: str) -> None:
    parts = losses(setting(moved.model, penalty), moved.trajectory)
    value = torch.stack([part.value for part in parts]).mean()
    theta = {name: tensor.clone().requires_grad_() for name, tensor in moved.theta.items()}
    expected = moved.objective(theta, penalty)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    ours = gradients(moved.model.tuned.trainable(), value)
    theirs = torch.autograd.grad(expected, list(theta.values()))
    for (name, got), want in zip(ours.items(), theirs, strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    ratios = torch.stack([part.ratios for part in parts])
    outside = (ratios - 1).abs() > CLIP
    assert outside.any() and not outside.all(), "both branches are to be seen"
    assert all((part.penalties["kl"] > 0) == (penalty != "plain") for part in parts)


def test_gradient_equals_finite_differences_of_the_surrogate(moved: Moved) -> None:
    """Unlike a truncated gradient, it is the derivative of a function of the weights: ours, taken naively."""
    made = setting(moved.model, "kl")
    parameters = moved.model.tuned.trainable()

    def value() -> Tensor:
        return torch.stack([part.value for part in losses(made, moved.trajectory)]).mean()

    found = gradients(parameters, value())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    h, values = 1e-7, []
    along = {name: normal(*p.shape, seed=50 + i) for i, (name, p) in enumerate(start.items())}
    with torch.no_grad():
        for sign in (1, -1):
            for name, p in parameters.items():
                p.copy_(start[name] + sign * h * along[name])
            values.append(value().item())
        for name, p in parameters.items():
            p.copy_(start[name])
    slope = (values[0] - values[1]) / (2 * h)
    assert abs(slope) > 1e-3
    assert sum((found[name] * along[name]).sum().item() for name in found) == pytest.approx(slope, rel=1e-4)


def test_a_step_without_variance_is_skipped(moved: Moved) -> None:
    """It is taken by the sampler, but has no log-probability and no loss."""
    made = setting(moved.model, scheduler={**SCHEDULER, "set_alpha_to_one": True})
    trajectory = rollout(made, made.model.encode(PROMPTS), noise_source(3))
    assert random_steps(made.sampler.schedule, ETA) == [0, 1, 2]
    assert trajectory.latents.shape[:2] == (3, TOTAL + 1) and trajectory.log_probs.shape == (3, TOTAL - 1)
    parts = losses(made, trajectory)
    assert len(parts) == TOTAL - 1
    assert all(part.value.isfinite() and (part.ratios - 1).abs().max() < 1e-6 for part in parts)


def test_the_kl_term_is_zero_while_the_models_are_equal(fresh: StableDiffusion) -> None:
    made = setting(fresh, "kl")
    trajectory = rollout(made, fresh.encode(PROMPTS), noise_source(3))
    assert [part.penalties["kl"].item() for part in losses(made, trajectory)] == [0.0] * TOTAL


class Drift:
    """A model that predicts the same noise everywhere, its only parameter, so that the expected image is known."""

    device = CPU
    offload = Offload(CPU, False)

    def __init__(self, latents: tuple[int, ...]) -> None:
        self.eps = torch.nn.Parameter(normal(*latents, seed=8))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def guided(self, given: Conditioning, negative: Conditioning, scale: float) -> Raw:
        return lambda x, timestep: self.eps.expand_as(x)


def test_it_is_the_gradient_of_the_expected_reward() -> None:
    """A toy whose expected reward is linear in the parameter: the mean over many trajectories has its slope."""
    n, latents = 100_000, (1, 2, 2)
    model, weight = Drift(latents), normal(*latents, seed=9)
    schedule, name = make_schedule(SCHEDULER, TOTAL)
    objective = ObjectiveConfig("ddpo", ddpo=DdpoConfig(history=None, adv_clip=100))
    sampler = Sampler(model, schedule, make_solver(name, ETA), 1.0, "", ETA)  # type: ignore[arg-type]
    made, planned = Problem(sampler, TinyScorer(), objective), plan(objective, schedule, 0, 0)
    conditioning = model.encode([""] * n)
    trajectory = rollout(made, conditioning, noise_source(n, latents))
    rewards = (trajectory.latents[:, -1] * weight).sum((1, 2, 3))
    advantages, _ = normalized_advantages(rewards.tolist(), [""] * n, {}, objective.ddpo)
    for index in range(TOTAL):
        (step_loss(made, planned, trajectory, index, conditioning, advantages).value / TOTAL).backward()

    # each step moves the mean by this factor of eps, which the later ones scale by their ratio of alphas
    slope = 0.0
    for step in schedule.steps:
        direction = sqrt(step.next_sigma**2 - ddim_deviation(step, ETA) ** 2)
        slope = slope * step.next_alpha / step.alpha + direction - step.next_alpha * step.sigma / step.alpha
    # log-probabilities are means over the 4 dimensions, the loss over the steps, and rewards are in deviations
    expected = -slope * weight / rewards.std() / weight.numel() / TOTAL
    assert model.eps.grad is not None
    error = (model.eps.grad - expected).norm() / expected.norm()
    assert error < 0.15  # it falls with the root of n: 0.14 at 40,000, 0.02 at 2,560,000
