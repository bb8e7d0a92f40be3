"""Conversions between predictions, and one solver step, against their definitions."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch.distributions import Normal

from draftplus.diffusion.schedule import Denoised, Prediction, Schedule, Step, denoised, make_schedule
from draftplus.diffusion.solvers import ddim_gaussian, ddim_log_prob, first_order, make_solver
from tests.tiny import SCHEDULER, SHAPE, normal

X0, EPS = normal(3, *SHAPE, seed=1), normal(3, *SHAPE, seed=2)


def step(alpha: float = 0.6, next_alpha: float = 0.8) -> Step:
    return Step(500, alpha, sqrt(1 - alpha**2), next_alpha, sqrt(1 - next_alpha**2))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_perfect_prediction_gives_back_image_and_noise(prediction: Prediction) -> None:
    level = Step(500, 0.4, 0.6, 0.7, 0.3) if prediction == "flow" else step()
    x = level.alpha * X0 + level.sigma * EPS
    raw = {
        "epsilon": EPS,
        "sample": X0,
        "v_prediction": level.alpha * EPS - level.sigma * X0,
        "flow": EPS - X0,
    }[prediction]
    now = denoised(raw, x, level, prediction)
    torch.testing.assert_close(now.x0, X0)
    torch.testing.assert_close(now.eps, EPS)
    # then every solver without noise lands on the line between them
    after = first_order(Schedule((level,), prediction), 0, x, now, None, None)
    torch.testing.assert_close(after, level.next_alpha * X0 + level.next_sigma * EPS)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_conversions_are_in_at_least_float32(given: torch.dtype, kept: torch.dtype) -> None:
    now = denoised(EPS.to(given), X0.to(given), step(), "epsilon")
    assert now.x0.dtype == now.eps.dtype == kept
    mixed = denoised(EPS.to(torch.bfloat16), X0, step(), "epsilon")
    assert mixed.x0.dtype == torch.float64


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("index", [0, 3, 8])
def test_log_probability(eta: float, index: int) -> None:
    level = make_schedule(SCHEDULER, 10)[0].steps[index]
    now = Denoised(X0, EPS)
    # equations 12 and 16 of the DDIM paper
    a, b = level.alpha**2, level.next_alpha**2
    deviation = eta * sqrt((1 - b) / (1 - a)) * sqrt(1 - a / b)
    mean = sqrt(b) * X0 + sqrt(1 - b - deviation**2) * EPS
    x_next = mean + deviation * normal(3, *SHAPE, seed=4)
    expected = Normal(mean, deviation).log_prob(x_next).mean((1, 2, 3))
    found = ddim_log_prob(level, now, eta, x_next)
    assert found.shape == (3,) and found.unique().numel() == 3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_log_probability_pulls_the_mean_towards_what_was_drawn() -> None:
    level, x_next = step(), normal(3, *SHAPE, seed=5)
    x0 = X0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ddim_log_prob(level, Denoised(x0, EPS), 1.0, x_next).sum(), x0)
    mean, deviation = ddim_gaussian(level, Denoised(X0, EPS), 1.0)
    torch.testing.assert_close(grad, level.next_alpha * (x_next - mean) / deviation**2 / X0[0].numel())


def test_a_step_without_variance_has_no_density() -> None:
    last = make_schedule({**SCHEDULER, "set_alpha_to_one": True}, 10)[0].steps[-1]
    for level, eta in ((step(), 0.0), (last, 1.0), (Step(0, 1.0, 0.0, 1.0, 0.0), 1.0)):
        with pytest.raises(ValueError, match="no log-probability"):
            ddim_log_prob(level, Denoised(X0, EPS), eta, X0)


def test_eta_zero_is_the_deterministic_step_and_one_is_ancestral_sampling() -> None:
    level, now = step(), Denoised(X0, EPS)
    mean, deviation = ddim_gaussian(level, now, 0.0)
    x = level.alpha * X0 + level.sigma * EPS
    assert deviation == 0.0
    torch.testing.assert_close(mean, first_order(Schedule((level,), "epsilon"), 0, x, now, None, None))
    # DDPM's posterior q(x_s | x_t, x_0), in its own formula (Ho et al. 2020, equations 6 and 7)
    a, b = level.alpha**2, level.next_alpha**2
    beta = 1 - a / b
    mean, deviation = ddim_gaussian(level, now, 1.0)
    posterior = sqrt(b) * beta / (1 - a) * X0 + sqrt(a / b) * (1 - b) / (1 - a) * x
    torch.testing.assert_close(mean, posterior)
    assert deviation == pytest.approx(sqrt((1 - b) / (1 - a) * beta))


def test_stochastic_steps_keep_the_marginal() -> None:
    """With exact x0 and eps, any eta gives x_s = alpha_s x0 + sigma_s noise with unit-variance noise."""
    level = step()
    for eta in (0.0, 0.5, 1.0):
        mean, deviation = ddim_gaussian(level, Denoised(torch.zeros_like(X0), torch.ones_like(X0)), eta)
        assert mean.flatten()[0].item() ** 2 + deviation**2 == pytest.approx(level.next_sigma**2)


def test_noise_is_asked_for_where_it_is_needed() -> None:
    schedule, name = make_schedule({**SCHEDULER, "set_alpha_to_one": True}, 4)
    solver, asked = make_solver(name, 0.5), []

    def noise(index: int) -> torch.Tensor:
        asked.append(index)
        return EPS

    for index in range(4):
        solver(schedule, index, X0, Denoised(X0, EPS), None, noise)
    assert asked == [0, 1, 2]  # the last step has no variance
    with pytest.raises(ValueError, match="needs noise"):
        solver(schedule, 0, X0, Denoised(X0, EPS), None, None)
