"""Annealed importance guidance: the schedules of its paper (arXiv 2409.06493), and the blend of both predictions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftplus.diffusion.annealing import anneal_weights, annealed
from draftplus.diffusion.sampler import Rollout, Sampler, sample
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import first_order
from draftplus.errors import UserError
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.types import Conditioning
from tests.tiny import PROMPTS, SCHEDULER, SHAPE, normal

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("linear", [0.0, 0.25, 0.5, 0.75]),
        ("power:2", [0.0, 0.0625, 0.25, 0.5625]),
        ("power:0.5", [0.0, 0.5, 0.5**0.5, 0.75**0.5]),
        ("step:0.5", [0.0, 0.0, 1.0, 1.0]),
        ("step:0.6", [0.0, 0.0, 0.0, 1.0]),
        ("step:0", [1.0, 1.0, 1.0, 1.0]),
        ("base", [0.0, 0.0, 0.0, 0.0]),
        ("tuned", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights(text: str, weights: list[float]) -> None:
    assert anneal_weights(text, 4) == pytest.approx(weights)


@pytest.mark.parametrize("text", ["", "liner", "linear:2", "power", "power:0", "power:x", "step:2", "step:", "base:1"])
def test_an_unknown_schedule_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="choose linear, power:P"):
        anneal_weights(text, 4)


@pytest.mark.parametrize("config", [SCHEDULER, FLOW], ids=["ddim", "flow"])
def test_each_step_blends_the_predictions(model: StableDiffusion, config: dict[str, object]) -> None:
    schedule, _ = make_schedule(config, 4)
    weights, given = [0.0, 0.3, 0.8, 1.0], model.encode(PROMPTS)
    calls: list[int] = []

    def predict(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        calls.append(1)
        return stock(x, t, conditioning)

    stock, model.predict = model.predict, predict  # type: ignore[method-assign]
    sampler, start = Sampler(model, schedule, first_order, 1.0), normal(3, *SHAPE)
    with torch.no_grad():
        blend = annealed(sampler.denoiser(given), sampler.frozen(given), weights)
        found = sample(blend, Rollout(start), schedule, first_order).latents
        assert len(calls) == 1 + 2 + 2 + 1  # only one model where the weight is 0 or 1

        x = start
        for step, w in zip(schedule.steps, weights, strict=True):
            t = torch.tensor(step.timestep)
            tuned = model.predict(x, t, given)
            with model.tuned.reference():
                base = model.predict(x, t, given)
            raw = (1 - w) * base + w * tuned
            if schedule.prediction == "flow":
                x = x + (step.next_sigma - step.sigma) * raw
            else:
                x = step.next_alpha * (x - step.sigma * raw) / step.alpha + step.next_sigma * raw
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_the_trivial_schedules_are_one_model_alone(model: StableDiffusion, which: str) -> None:
    schedule, _ = make_schedule(SCHEDULER, 3)
    given, start = model.encode(PROMPTS), Rollout(normal(3, *SHAPE))

    sampler = Sampler(model, schedule, first_order, 1.0)
    with torch.no_grad():
        blend = annealed(sampler.denoiser(given), sampler.frozen(given), anneal_weights(which, 3))
        found = sample(blend, start, schedule, first_order).latents
        tuned = sampler.sample(given, start).latents
        with model.tuned.reference():
            base = sampler.sample(given, start).latents
    assert torch.equal(found, base if which == "base" else tuned) and not torch.equal(base, tuned)
