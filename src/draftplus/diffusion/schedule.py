"""Noise schedules, read from a checkpoint's scheduler configuration.

Every model is written as x_t = alpha_t * x_0 + sigma_t * eps. A schedule is the list of steps that a sampler takes,
each from one level (alpha, sigma) to the next, so that solvers need not know which model they serve.

Sources: variance-preserving DDIM, Song et al. 2021 (arXiv 2010.02502); spacings, Lin et al. 2023 (arXiv 2305.08891,
table 2); flow matching with shifted sigmas, Esser et al. 2024 (arXiv 2403.03206, section 5.3.2). Timesteps and levels
equal those of diffusers' DDIMScheduler, DPMSolverMultistepScheduler and FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from draftplus.config import choices_of
from draftplus.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
SPACINGS = choices_of("sampler.spacing")
SOLVERS = tuple(name for name in choices_of("sampler.solver") if name != "auto")
CONSISTENCY = ("LCMScheduler", "TCDScheduler")  # of distilled models, whose few steps no other solver replaces


class Step(NamedTuple):
    """One solver step from level (alpha, sigma) to (next_alpha, next_sigma); the denoiser is told `timestep`."""

    timestep: float
    alpha: float
    sigma: float
    next_alpha: float
    next_sigma: float


@dataclass(frozen=True)
class Schedule:
    """The steps from pure noise (step 0) to the image, and what the denoiser predicts."""

    steps: tuple[Step, ...]
    prediction: Prediction
    timestep_dtype: torch.dtype = torch.int64

    def __len__(self) -> int:
        return len(self.steps)

    def timestep(self, index: int, device: torch.device | str) -> Tensor:
        """What the denoiser is told at a step, a scalar tensor."""
        return torch.tensor(self.steps[index].timestep, dtype=self.timestep_dtype, device=device)


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


def make_schedule(
    config: Mapping[str, Any], steps: int, solver: str = "auto", spacing: str | None = None
) -> tuple[Schedule, str]:
    """The schedule and the solver's name for a checkpoint's scheduler configuration.

    config: the scheduler's `scheduler_config.json`, and what a flow model's stock pipeline computes for its
    `set_timesteps`: `mu`, the resolution shift of dynamic shifting, and `sigmas`, the levels before the shift. solver:
    "auto" (DDIM for variance-preserving models, Euler for flow matching) or one of SOLVERS. spacing: one of SPACINGS,
    None for the checkpoint's own.

    Raises UserError for a solver, spacing or number of steps that the model cannot be sampled with.
    """
    flow = "FlowMatch" in str(config.get("_class_name", "")) or config.get("prediction_type") == "flow_prediction"
    name = ("euler" if flow else "ddim") if solver == "auto" else solver
    if name not in SOLVERS:
        raise UserError(f"sampler.solver: unknown solver '{solver}'; choose auto, {', '.join(SOLVERS)}")
    if spacing is not None and spacing not in SPACINGS:
        raise UserError(f"sampler.spacing: unknown spacing '{spacing}'; choose {', '.join(SPACINGS)}")
    if solver == "auto" and config.get("_class_name") in CONSISTENCY:
        raise UserError(
            f"the model's scheduler is {config['_class_name']}, which is not supported; to sample with another solver "
            "than it was made for, set sampler.solver=ddim"
        )
    train_steps = int(config.get("num_train_timesteps", 1000))
    if not 1 <= steps <= train_steps:
        raise UserError(f"sampler.steps is {steps}; this model takes 1 to {train_steps}")
    if flow:
        if name != "euler":
            raise UserError(
                f"sampler.solver={name} is for variance-preserving models; use euler for this flow-matching model"
            )
        if spacing is not None:
            raise UserError("sampler.spacing does not apply to flow-matching models; leave it null")
        return _flow(config, steps), name
    _refuse_unsupported(config, name)
    return _variance_preserving(config, steps, name, spacing or config.get("timestep_spacing", "leading")), name


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The cumulative product of 1 - beta_t over the training timesteps, (num_train_timesteps,) float64.

    Raises UserError for a beta schedule that is not known.
    """
    n = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(first, last, n, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":

        def bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], dtype=torch.float64)
    else:
        raise UserError(
            f"the model's scheduler has beta_schedule '{kind}'; supported: linear, scaled_linear, squaredcos_cap_v2"
        )
    cumulative = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1
        root = cumulative.sqrt()
        cumulative = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return cumulative


def _refuse_unsupported(config: Mapping[str, Any], solver: str) -> None:
    sigmas = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    for key in sigmas if solver != "ddim" else ():
        if config.get(key):
            raise UserError(
                f"the model's scheduler_config.json has {key}: true, which {solver} does not support "
                "here; set it to false, or use sampler.solver=ddim"
            )
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise UserError(
                f"the model's scheduler_config.json has {key}: true, which clips the latents and is meant for "
                f"pixel-space models; set it to false"
            )


def _variance_preserving(config: Mapping[str, Any], steps: int, solver: str, spacing: str) -> Schedule:
    bars = alphas_cumprod(config)
    n = len(bars)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"the model's scheduler has prediction_type '{prediction}'; supported: epsilon, v_prediction, sample"
        )
    if prediction == "epsilon" and float(bars[-1]) < 1e-12:
        raise UserError(
            "the model's scheduler combines epsilon prediction with zero terminal SNR, for which x_0 is undefined"
        )
    if solver == "dpmpp_2m" and config.get("rescale_betas_zero_snr"):
        bars[-1] = 2**-24  # as in diffusers: it works with log(alpha / sigma), which must be finite
    clean = 1.0 if config.get("set_alpha_to_one", True) else float(bars[0])
    timesteps = _timesteps(n, steps, solver, spacing, int(config.get("steps_offset", 0)))
    if solver == "ddim":  # the level after a step is one stride down, which is not always the next timestep
        following = [t - n // steps for t in timesteps]
    else:
        following = [*timesteps[1:], -1]
        clean = 1.0 if solver == "euler" or config.get("final_sigmas_type", "zero") == "zero" else float(bars[0])

    def level(t: int) -> tuple[float, float]:
        bar = float(bars[t]) if t >= 0 else clean
        return math.sqrt(bar), math.sqrt(1 - bar)

    pairs = zip(timesteps, following, strict=True)
    return Schedule(tuple(Step(t, *level(t), *level(s)) for t, s in pairs), prediction)


def _timesteps(n: int, steps: int, solver: str, spacing: str, offset: int) -> list[int]:
    # in numpy's order of operations, as in diffusers: where a timestep falls on a half, its last bit decides
    multistep = solver == "dpmpp_2m"
    if spacing == "trailing":
        stride = (n - n / steps) - n
        return [round(n + i * stride) - 1 for i in range(steps)]
    if spacing == "linspace":
        points = steps + 1 if multistep else steps
        stride = (n - 1) / max(points - 1, 1)
        grid = [round(i * stride) for i in range(points)]
        return grid[::-1][:steps]
    if spacing == "leading":
        stride = n // (steps + 1) if multistep else n // steps
        grid = [i * stride + offset for i in range(steps + 1 if multistep else steps)]
        timesteps = grid[::-1][:steps]
        if timesteps[0] >= n:
            raise UserError(
                f"sampler.steps={steps} with the model's steps_offset={offset} reaches timestep "
                f"{timesteps[0]} of {n}; use fewer steps or sampler.spacing=trailing"
            )
        return timesteps
    raise UserError(f"the model's scheduler has timestep_spacing '{spacing}'; choose {', '.join(SPACINGS)}")


def _flow(config: Mapping[str, Any], steps: int) -> Schedule:
    for key in (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
    ):
        if config.get(key):
            raise UserError(
                f"the model's scheduler_config.json has {key}: true, which is not supported; set it to false"
            )
    n = int(config.get("num_train_timesteps", 1000))
    shift = float(config.get("shift", 1.0))

    def shifted(s: float) -> float:
        return shift * s / (1 + (shift - 1) * s)

    given = config.get("sigmas")
    if given is not None and len(given) != steps:
        raise ValueError(f"{len(given)} sigmas for {steps} steps")
    if config.get("use_dynamic_shifting"):
        mu = config.get("mu")
        if mu is None:
            raise UserError(
                "the shift of this flow-matching model depends on the image size: its scheduler() must give mu"
            )
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        given = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist() if given is None else given
    elif given is None:  # diffusers shifts the training sigmas' ends, spaces evenly between them, and shifts again
        given = torch.linspace(shifted(1.0), shifted(1 / n), steps, dtype=torch.float64).tolist()
    sigmas = [shifted(s) for s in given]
    terminal = config.get("shift_terminal")
    if terminal:
        if steps == 1:
            raise UserError("sampler.steps is 1; the model's scheduler has a shift_terminal, which needs at least 2")
        stretch = (1 - sigmas[-1]) / (1 - float(terminal))
        sigmas = [1 - (1 - s) / stretch for s in sigmas]
    levels = [*sigmas, 0.0]
    made = tuple(Step(s * n, 1 - s, s, 1 - r, r) for s, r in pairwise(levels))
    return Schedule(made, "flow", torch.float32)
