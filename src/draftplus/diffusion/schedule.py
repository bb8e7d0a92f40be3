"""Noise schedules, read from a checkpoint's scheduler configuration.

Every model is written as x_t = alpha_t * x_0 + sigma_t * eps. A schedule is the list of steps that a sampler takes,
each from one level (alpha, sigma) to the next, so that solvers need not know which model they serve.

Sources: variance-preserving DDIM, Song et al. 2021 (arXiv 2010.02502); flow matching with shifted sigmas, Esser et al.
2024 (arXiv 2403.03206, section 5.3.2). Timesteps and levels equal those of diffusers' DDIMScheduler,
EulerDiscreteScheduler, DPMSolverMultistepScheduler and FlowMatchEulerDiscreteScheduler, save for DDIM with linspace
spacing (`levels.ddim_steps`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from draftplus.config import choices_of
from draftplus.diffusion.levels import (
    LINEAR,
    SMALLEST_BAR,
    SPACINGS,
    alphas_cumprod,
    ddim_steps,
    flow_levels,
    refuse_unsupported,
    saved,
    sigma_steps,
)
from draftplus.errors import UserError, notice

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
SOLVERS = tuple(name for name in choices_of("sampler.solver") if name != "auto")
# a model's own scheduler class -> the solver that samples as it does, or that has long stood for it; others get a line
FOLLOWED = {
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
}
# of distilled models, whose few steps no other solver replaces
CONSISTENCY = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")


class Step(NamedTuple):
    """One solver step from level (alpha, sigma) to (next_alpha, next_sigma); the denoiser is told `timestep`."""

    timestep: float
    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float

    @property
    def is_still(self) -> bool:
        """Whether it leads to as much noise as it came from, and so back to its latents, whatever is predicted."""
        return math.isclose(self.alpha * self.next_sigma, self.sigma * self.next_alpha, rel_tol=1e-9)


@dataclass(frozen=True)
class Schedule:
    """The steps from pure noise (step 0) to the image, and what the denoiser predicts.

    start: the factor of the noise that sampling starts from. extrapolates: the steps at which a multistep solver uses
    the prediction before, and `heun`: by Heun's rule instead of the midpoint's.
    """

    steps: tuple[Step, ...]
    prediction: Prediction
    timestep_dtype: torch.dtype = torch.int64
    start: float = 1.0
    extrapolates: frozenset[int] = frozenset()
    heun: bool = False

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_sigma(self) -> float:
        """The noise level of the last step, as sigma of x_t = alpha * x_0 + sigma * eps.

        The reward's gradient of that step is multiplied by it where the denoiser predicts a flow's velocity.
        """
        return self.steps[-1].sigma

    def timestep(self, index: int, device: torch.device | str) -> Tensor:
        """What the denoiser is told at a step, a scalar tensor."""
        # made there: a copy from the CPU would wait for all that the device has to do before it
        return torch.full((), self.steps[index].timestep, dtype=self.timestep_dtype, device=device)


class Denoised(NamedTuple):
    """A prediction in the two forms that solvers and penalties use, each (b, c, h, w)."""

    x0: Tensor
    eps: Tensor


def denoised(raw: Tensor, x: Tensor, step: Step, prediction: Prediction) -> Denoised:
    """Turns a raw prediction at x into (x0, eps), in at least float32 (float64 stays float64).

    raw, x: (b, c, h, w). With v = alpha * eps - sigma * x0 (Salimans and Ho 2022, arXiv 2202.00512) and flow velocity
    u = eps - x0.
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(raw.dtype, x.dtype))
    raw, x = raw.to(dtype), x.to(dtype)
    alpha, sigma = step.alpha, step.sigma
    if prediction == "epsilon":
        return Denoised((x - sigma * raw) / alpha, raw)
    if prediction == "v_prediction":
        return Denoised(alpha * x - sigma * raw, alpha * raw + sigma * x)
    if prediction == "flow":
        return Denoised(x - sigma * raw, x + (1 - sigma) * raw)
    return Denoised(raw, (x - alpha * raw) / sigma)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is of flow matching."""
    return "FlowMatch" in str(config.get("_class_name", ""))


def solver_of(config: Mapping[str, Any], solver: str = "auto") -> str:
    """The solver's name. "auto": that of the scheduler class that a model's file names, as its stock pipeline samples;
    Euler for other classes of flow matching, DDIM for all others.

    config: the scheduler's `scheduler_config.json`; {} where it is not known.

    Raises UserError for a solver that does not exist.
    """
    if solver == "auto":
        return FOLLOWED.get(config.get("_class_name", ""), "euler" if is_flow(config) else "ddim")
    if solver not in SOLVERS:
        raise UserError(f"sampler.solver: unknown solver '{solver}'; choose auto, {', '.join(SOLVERS)}")
    return solver


def make_schedule(
    config: Mapping[str, Any],
    steps: int,
    solver: str = "auto",
    spacing: str | None = None,
    sigmas: Sequence[float] | None = None,
) -> tuple[Schedule, str]:
    """The schedule and the solver's name for a checkpoint's scheduler configuration.

    config: the scheduler's `scheduler_config.json`, and what a flow model's stock pipeline computes for its
    `set_timesteps`: `mu`, the resolution shift of dynamic shifting, and `sigmas`, the levels before the shift. solver:
    "auto" (`solver_of`) or one of SOLVERS. spacing: None for the checkpoint's own, or where it names none that of the
    solver's stock class. sigmas: of a flow model, in place of those of `config`, which `spacing` replaces too.

    Raises UserError for a solver, spacing or number of steps that the model cannot be sampled with.
    """
    config = saved(config)
    flow, cls = is_flow(config), config.get("_class_name")
    name = solver_of(config, solver)
    if spacing not in (None, LINEAR, *SPACINGS):
        raise UserError(f"sampler.spacing: unknown spacing '{spacing}'; choose {', '.join((*SPACINGS, LINEAR))}")
    if solver == "auto" and cls in CONSISTENCY:
        raise UserError(
            f"the model's scheduler is {cls}, which is not supported; to sample with another solver "
            f"than it was made for, set sampler.solver={name}"
        )
    if not flow and config.get("prediction_type") == "flow_prediction":
        raise UserError(
            f"the model's scheduler, {cls or 'of no named class'}, has prediction_type 'flow_prediction', which is not "
            "supported"
        )
    if solver == "auto" and cls is not None and cls not in FOLLOWED:
        notice(f"the model's scheduler is {cls}; sampler.solver=auto samples with {name} in its place")
    train_steps = int(config.get("num_train_timesteps", 1000))
    if not 1 <= steps <= train_steps:
        raise UserError(f"sampler.steps is {steps}; this model takes 1 to {train_steps}")
    if flow:
        if name != "euler":
            raise UserError(
                f"sampler.solver={name} is for variance-preserving models; use euler for this flow-matching model"
            )
        if spacing in SPACINGS:
            raise UserError(
                f"sampler.spacing={spacing} does not apply to flow-matching models; choose linear, or null for the "
                "stock pipeline's own"
            )
        timesteps, levels = flow_levels(config, steps, spacing, sigmas)
        pairs = pairwise([*levels, 0.0])
        made = tuple(Step(t, 1 - s, s, 1 - r, r) for t, (s, r) in zip(timesteps, pairs, strict=True))
        return Schedule(made, "flow", torch.float32), name
    if sigmas is not None:
        raise UserError("sampler.sigmas is for flow-matching models, and this one is none; set sampler.spacing instead")
    if spacing == LINEAR:
        raise UserError(
            f"sampler.spacing=linear is for flow-matching models, and this one is none; choose {', '.join(SPACINGS)}"
        )
    refuse_unsupported(config, name)
    spacing = spacing or config.get("timestep_spacing") or ("leading" if name == "ddim" else "linspace")
    return _variance_preserving(config, steps, name, spacing), name


def _variance_preserving(config: Mapping[str, Any], steps: int, solver: str, spacing: str) -> Schedule:
    bars = alphas_cumprod(config)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"the model's scheduler has prediction_type '{prediction}'; supported: epsilon, v_prediction, sample"
        )
    if prediction == "epsilon" and float(bars[-1]) < 1e-12:
        raise UserError(
            "the model's scheduler combines epsilon prediction with zero terminal SNR, for which x_0 is undefined"
        )
    if solver == "ddim":
        clean = 1.0 if config.get("set_alpha_to_one", True) else float(bars[0])

        def level(t: int) -> tuple[float, float]:
            bar = float(bars[t]) if t >= 0 else clean
            return math.sqrt(bar), math.sqrt(1 - bar)

        pairs = zip(*ddim_steps(config, bars, steps, spacing), strict=True)
        return Schedule(tuple(Step(t, *level(t), *level(s)) for t, s in pairs), prediction)

    if config.get("rescale_betas_zero_snr"):
        bars[-1] = SMALLEST_BAR
    timesteps, sigmas = sigma_steps(config, bars, steps, solver, spacing)
    alphas = [1 / math.sqrt(1 + sigma**2) for sigma in sigmas]
    if solver == "euler":  # diffusers' keeps x / alpha, and decodes that
        alphas[-1] = 1.0
    levels = pairwise((alpha, sigma * alpha) for alpha, sigma in zip(alphas, sigmas, strict=True))
    made = tuple(Step(t, *now, *after) for t, (now, after) in zip(timesteps, levels, strict=True))
    if solver == "euler":  # diffusers' starts from sigma times the noise, with leading spacing from one in proportion
        return Schedule(made, prediction, torch.float32, 1.0 if spacing == "leading" else made[0].sigma)
    return Schedule(
        made, prediction, extrapolates=_extrapolates(config, steps), heun=config.get("solver_type") == "heun"
    )


def _extrapolates(config: Mapping[str, Any], steps: int) -> frozenset[int]:
    if config.get("solver_order") == 1:
        return frozenset()
    plain_end = (
        config.get("euler_at_final", False)
        or (config.get("lower_order_final", True) and steps < 15)
        or config.get("final_sigmas_type", "zero") == "zero"
    )
    return frozenset(range(1, steps - 1 if plain_end else steps))
