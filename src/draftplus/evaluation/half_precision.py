"""Sampling a model in half precision as its stock pipeline does, which rounds the latents at every step.

Between the passes of the denoiser our own sampler computes in float32, as the gradient and the penalty need it. A
picture for people is to be the stock pipeline's, so here its own scheduler takes the steps.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.diffusion.levels import LINEAR, linear
from draftplus.diffusion.overflow import Watch, precision_of
from draftplus.diffusion.sampler import Sampler
from draftplus.diffusion.schedule import is_flow, solver_of
from draftplus.diffusion.solvers import StepNoise
from draftplus.models.scheduler_file import differs_from_stock, stock_scheduler
from draftplus.types import Conditioning, Model


def rounds(model: Model, config: SamplerConfig) -> bool:
    """Whether the stock pipeline draws a model's pictures in half precision, and with these settings."""
    half = precision_of(model) in (torch.bfloat16, torch.float16)
    return half and not differs_from_stock(model.scheduler_config, config)


@torch.no_grad()
def rounded_latents(
    model: Model, sampler: Sampler, config: SamplerConfig, conditioning: Conditioning, noise: StepNoise, watch: Watch
) -> Tensor:
    """The final latents (b, c, h, w) of b prompts, in the precision that the stock pipeline keeps them in.

    noise: as for `sample`, where step -1 is the noise that sampling starts from. watch: looks at every prediction.
    """
    raw, scheduler = sampler.guided(conditioning), _scheduler(model, config)
    x = noise(-1).to(model.noise_dtype)
    model.offload.idle()
    flow, drawn = is_flow(model.scheduler_config), {}
    if not flow:
        x = x * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        with model.tuned.reference() if index < sampler.gate else nullcontext():
            prediction = raw(x if flow else scheduler.scale_model_input(x, timestep), timestep)
        watch.look(index, prediction)
        if sampler.eta:
            drawn = {"eta": sampler.eta, "variance_noise": noise(index).to(x)}
        x = scheduler.step(prediction, timestep, x, return_dict=False, **drawn)[0]
    return x


def _scheduler(model: Model, config: SamplerConfig) -> Any:
    given = model.scheduler_config
    scheduler = stock_scheduler(given, solver_of(given, config.solver), config.spacing)
    steps = config.steps
    assert steps is not None
    if not is_flow(given):
        scheduler.set_timesteps(steps, device=model.device)
        return scheduler
    told = model.scheduler(model.latent_shape(config.height, config.width), steps)
    sigmas = linear(steps) if config.spacing == LINEAR else config.sigmas or told.get("sigmas")
    scheduler.set_timesteps(steps, device=model.device, sigmas=sigmas, mu=told.get("mu"))
    return scheduler
