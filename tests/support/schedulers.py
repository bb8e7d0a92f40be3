"""A toy denoiser, and its trajectories by a stock scheduler and by ours, from the same noise."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from draftplus.diffusion.guidance import denoiser
from draftplus.diffusion.sampler import Rollout, sample
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver
from tests.tiny import SHAPE, normal

MIX = normal(4, 4, seed=9)
START = normal(2, *SHAPE, seed=3)


def toy(x: Tensor, t: Tensor) -> Tensor:
    """A smooth denoiser whose output depends on the timestep it is told."""
    return 0.8 * torch.tanh(torch.einsum("ij,bjhw->bihw", MIX.to(x), x) + torch.sin(t.to(x) / 60))


def fresh_noise(index: int) -> Tensor:
    return normal(2, *SHAPE, seed=100 + index)


def stock(scheduler: Any, **step: Any) -> Tensor:
    x = START * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else START
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        extra = {"variance_noise": fresh_noise(i)} if step.get("eta") else {}
        x = scheduler.step(toy(seen, t), t, x, **step, **extra).prev_sample
    return x


def stock_to_the_next_timestep(scheduler: Any) -> Tensor:
    """Stock DDIM's own arithmetic, each step to the level of the next timestep: its stride is set to that distance."""
    x, timesteps = START, scheduler.timesteps.tolist()
    scheduler.num_inference_steps = 1
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        scheduler.register_to_config(num_train_timesteps=t - following)  # which a step reads for its stride alone
        x = scheduler.step(toy(x, torch.tensor(t)), t, x).prev_sample
    return x


def ours(config: dict[str, Any], steps: int, solver: str, eta: float = 0.0, **settings: Any) -> Tensor:
    schedule, name = make_schedule(config, steps, solver, **settings)
    start = Rollout(START * schedule.start)
    return sample(denoiser(toy, schedule), start, schedule, make_solver(name, eta), noise=fresh_noise).latents


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-4, rtol=0)


def as_saved(scheduler: Any) -> dict[str, Any]:
    """The scheduler_config.json that diffusers writes for it."""
    saved: dict[str, Any] = json.loads(scheduler.to_json_string())
    return saved
