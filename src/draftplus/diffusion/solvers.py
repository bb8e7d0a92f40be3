"""Solvers: one step from a level to the next, the same for every model.

Deterministic DDIM and flow-matching Euler are both x_s = alpha_s * x0 + sigma_s * eps. A solver is a function of the
schedule, the step's index, the latents, the prediction there, the x0 predicted at the step before, and a source of
fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor

from draftplus.diffusion.schedule import Denoised, Schedule, Step
from draftplus.errors import UserError

StepNoise = Callable[[int], Tensor]  # a step's index -> standard normal (b, c, h, w)


class Solver(Protocol):
    """x: (b, c, h, w) latents at step `index`; previous: the x0 of step index - 1. Returns the next latents."""

    def __call__(
        self, schedule: Schedule, index: int, x: Tensor, now: Denoised, previous: Tensor | None, noise: StepNoise | None
    ) -> Tensor: ...


def make_solver(name: str, eta: float = 0.0, key: str = "sampler.eta") -> Solver:
    """The solver of a name that `make_schedule` resolved.

    Raises UserError if eta is not in [0, 1], or above 0 with a deterministic solver.
    """
    if eta < 0 or eta > 1:
        raise UserError(f"{key} is {eta}; it must be between 0 and 1")
    if eta > 0 and name != "ddim":
        raise UserError(f"{key}={eta} needs sampler.solver=ddim; {name} is deterministic")
    if name == "dpmpp_2m":
        return dpmpp_2m
    return partial(ddim, eta=eta) if eta > 0 else first_order


def first_order(
    schedule: Schedule, index: int, x: Tensor, now: Denoised, previous: Tensor | None, noise: StepNoise | None
) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, equation 12 with eta = 0), which is also Euler for flow matching."""
    step = schedule.steps[index]
    return step.next_alpha * now.x0 + step.next_sigma * now.eps


def ddim(
    schedule: Schedule,
    index: int,
    x: Tensor,
    now: Denoised,
    previous: Tensor | None,
    noise: StepNoise | None,
    eta: float,
) -> Tensor:
    """DDIM with noise, eta in (0, 1] (Song et al. 2021, equations 12 and 16)."""
    mean, deviation = ddim_gaussian(schedule.steps[index], now, eta)
    if deviation == 0:
        return mean
    if noise is None:
        raise ValueError("DDIM with eta > 0 needs noise")
    return mean + deviation * noise(index).to(mean)


def ddim_gaussian(step: Step, now: Denoised, eta: float) -> tuple[Tensor, float]:
    """Mean (b, c, h, w) and standard deviation of p(x_next | x) under DDIM with eta."""
    if step.sigma == 0:
        return step.next_alpha * now.x0, 0.0
    deviation = ddim_deviation(step, eta)
    direction = math.sqrt(max(0.0, step.next_sigma**2 - deviation**2))
    return step.next_alpha * now.x0 + direction * now.eps, deviation


def ddim_deviation(step: Step, eta: float) -> float:
    """The standard deviation of a DDIM step's fresh noise; 0 where the next level has no noise."""
    if step.sigma == 0:
        return 0.0
    ratio = step.alpha / step.next_alpha
    return eta * step.next_sigma / step.sigma * math.sqrt(max(0.0, 1 - ratio**2))


def random_steps(schedule: Schedule, eta: float) -> list[int]:
    """The steps that draw noise, and so have a probability."""
    return [index for index, step in enumerate(schedule.steps) if ddim_deviation(step, eta) > 0]


def ddim_log_prob(step: Step, now: Denoised, eta: float, x_next: Tensor) -> Tensor:
    """log p(x_next | x) of a DDIM step, averaged over latent dimensions as DDPO does (arXiv 2305.13301). Returns (b,).

    Raises ValueError where the step has no variance, so that there is no density.
    """
    mean, deviation = ddim_gaussian(step, now, eta)
    if deviation == 0:
        raise ValueError("a step without variance has no log-probability")
    log_prob = -((x_next - mean) ** 2) / (2 * deviation**2) - math.log(deviation) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def dpmpp_2m(
    schedule: Schedule, index: int, x: Tensor, now: Denoised, previous: Tensor | None, noise: StepNoise | None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), of first order where the schedule says so.

    It is the first-order step with x0 extrapolated from the x0 of the step before, to half of the step (midpoint) or
    with the integral of the line through both (Heun).
    """
    step = schedule.steps[index]
    if previous is None or index not in schedule.extrapolates or step.is_still:
        return first_order(schedule, index, x, now, previous, noise)
    before = schedule.steps[index - 1]
    h = _log_snr(step.next_alpha, step.next_sigma) - _log_snr(step.alpha, step.sigma)
    ratio = (_log_snr(step.alpha, step.sigma) - _log_snr(before.alpha, before.sigma)) / h
    change = math.expm1(-h)
    how_far = -(change / h + 1) / change if schedule.heun else 0.5
    x0 = now.x0 + (now.x0 - previous) * (how_far / ratio)
    return (step.next_sigma / step.sigma) * x - step.next_alpha * change * x0


def _log_snr(alpha: float, sigma: float) -> float:
    return math.log(alpha) - math.log(sigma)
