"""The timesteps and noise levels of a checkpoint's scheduler configuration, as the stock schedulers space them.

The judge is `from_config` of diffusers' DDIMScheduler, EulerDiscreteScheduler and DPMSolverMultistepScheduler, for
`ddim`, `euler` and `dpmpp_2m`, and FlowMatchEulerDiscreteScheduler for flow-matching models: a setting that the class
reads is honoured here, or refused by name; others are ignored. A level is written as (alpha, sigma), or of Euler and
DPM-Solver++ as the one number sigma / alpha.

Spacings: Lin et al. 2023 (arXiv 2305.08891, table 2); Karras et al. 2022 (arXiv 2206.00364, equation 5); evenly spaced
log-SNR, Lu et al. 2022 (arXiv 2206.00927). Shifted sigmas of flow matching: Esser et al. 2024 (arXiv 2403.03206,
section 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from draftplus.config import choices_of
from draftplus.errors import UserError

LINEAR = "linear"  # the one spacing of flow-matching models
SPACINGS = tuple(name for name in choices_of("sampler.spacing") if name != LINEAR)
FILE = "the model's scheduler_config.json"
KARRAS_RHO = 7.0
SMALLEST_BAR = 2**-24  # diffusers' stand-in for zero terminal SNR where log(alpha / sigma) must be finite

# solver -> settings of its stock class that change the picture and are not reproduced, with the values that do not
REFUSED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddim": {"clip_sample": (None, False), "thresholding": (None, False)},
    "euler": {
        "use_exponential_sigmas": (None, False),
        "use_beta_sigmas": (None, False),
        "interpolation_type": (None, "linear"),
    },
    "dpmpp_2m": {
        "use_exponential_sigmas": (None, False),
        "use_beta_sigmas": (None, False),
        "use_flow_sigmas": (None, False),
        "thresholding": (None, False),
        "algorithm_type": (None, "dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++
        "solver_order": (None, 1, 2),
        "solver_type": (None, "midpoint", "heun", "logrho", "bh1", "bh2"),  # those of DEIS and UniPC as midpoint
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    },
}
CLIPS = ("clip_sample", "thresholding")
FLOW_REFUSED = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"
)  # fmt: skip


def saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration as its file has it: without what diffusers filled in, which `from_config` ignores."""
    filled = {*config.get("_use_default_values", ()), "_use_default_values"}
    return {key: value for key, value in config.items() if key not in filled}


def refuse_unsupported(config: Mapping[str, Any], solver: str) -> None:
    """UserError for a setting that the solver's stock class reads and this one cannot reproduce; it names the key."""
    if "sigma_data" in config:
        raise UserError(
            f"the model's scheduler is {config.get('_class_name', 'one with sigma_data')}, whose noise levels are not "
            "those of a variance-preserving model; it is not supported"
        )
    for key, allowed in REFUSED[solver].items():
        _refuse_unless(config, key, allowed, solver)
    if solver == "euler" and config.get("prediction_type") == "v_prediction":
        _refuse_unless(config, "timestep_type", (None, "discrete"), solver)
    if solver == "dpmpp_2m" and config.get("beta_schedule") == "squaredcos_cap_v2":
        for key in ("use_karras_sigmas", "use_lu_lambdas"):
            _refuse_unless(config, key, (None, False), solver)
    final = config.get("final_sigmas_type", "zero")
    if solver != "ddim" and final not in ("zero", "sigma_min"):
        raise UserError(f"{FILE} has final_sigmas_type '{final}'; supported: zero, sigma_min")


def _refuse_unless(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], solver: str) -> None:
    value = config.get(key)
    if value not in allowed:
        clips = "which clips the latents and is meant for pixel-space models; set it to false"
        other = f"which sampler.solver={solver} does not support here; use sampler.solver=ddim, or another value there"
        shown = str(value).lower() if isinstance(value, bool) else value
        raise UserError(f"{FILE} has {key}: {shown}, {clips if key in CLIPS else other}")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The cumulative product of 1 - beta_t over the training timesteps, (num_train_timesteps,) float64.

    Raises UserError for a beta schedule that is not known.
    """
    n = int(config.get("num_train_timesteps", 1000))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        if len(betas) != n:
            raise UserError(f"{FILE} has {len(betas)} trained_betas, but num_train_timesteps is {n}")
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


def flow_levels(
    config: Mapping[str, Any], steps: int, spacing: str | None, sigmas: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """The timesteps and the sigmas of FlowMatchEulerDiscreteScheduler, (steps) each, equal to its float32 ones.

    sigmas: before the shift; None: as `spacing` says, or else `config["sigmas"]`, those that the stock pipeline passes,
    or else those that the class itself takes, evenly spaced between the ends of its shifted table.

    Raises UserError for settings and numbers of steps that it cannot be sampled with.
    """
    for key in FLOW_REFUSED:
        if config.get(key):
            raise UserError(f"{FILE} has {key}: true, which is not supported; set it to false")
    kind, terminal = config.get("time_shift_type", "exponential"), config.get("shift_terminal")
    if kind not in ("exponential", "linear"):
        raise UserError(f"{FILE} has time_shift_type '{kind}'; supported: exponential, linear")
    if config.get("scale_factors"):
        raise UserError(f"{FILE} has scale_factors, which are not supported")
    if terminal and steps == 1:
        raise UserError("sampler.steps is 1; the model's scheduler has a shift_terminal, which needs at least 2")
    n = int(config.get("num_train_timesteps", 1000))
    if config.get("use_dynamic_shifting"):
        mu = config.get("mu")
        if mu is None:
            raise UserError(
                "the shift of this flow-matching model depends on the image size: its scheduler() must give mu"
            )
        factor, static = mu if kind == "linear" else math.exp(mu), 1.0

        def shifted(s: Tensor) -> Tensor:
            return torch.full_like(s, factor) / (factor + (1 / s - 1))  # a number over a tensor is rounded twice
    else:
        static = float(config.get("shift", 1.0))

        def shifted(s: Tensor) -> Tensor:
            return static * s / (1 + (static - 1) * s)

    given = linear(steps) if spacing == LINEAR else config.get("sigmas") if sigmas is None else sigmas
    if given is None:  # in float64 between the two ends, which are in float32 and already shifted
        ends = torch.tensor([1.0, 1 / n], dtype=torch.float32)
        high, low = (static * ends / (1 + (static - 1) * ends)).double() * n
        levels = _linspace(float(high), float(low), steps) / n
    else:
        levels = torch.as_tensor(given).to(torch.float32)
        if len(levels) != steps:
            raise ValueError(f"{len(levels)} sigmas for {steps} steps")
    levels = shifted(levels)
    if terminal:
        levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - float(terminal)))
    levels = levels.to(torch.float32)
    return (levels * n).tolist(), levels.tolist()


def linear(steps: int) -> list[float]:
    """The sigmas from 1 down to 1 / steps that many flow models' stock pipelines pass to their scheduler."""
    return _linspace(1.0, 1 / steps, steps).tolist()


def _linspace(first: float, last: float, points: int) -> Tensor:
    # in numpy's order of operations, as in diffusers, which is not that of torch.linspace
    between = torch.arange(points, dtype=torch.float64) * ((last - first) / max(points - 1, 1)) + first
    between[-1] = last if points > 1 else first
    return between


def ddim_steps(config: Mapping[str, Any], bars: Tensor, steps: int, spacing: str) -> tuple[list[int], list[int]]:
    """The timesteps of DDIM, and for each the one whose level the step leads to; below 0: the clean image.

    With leading and trailing spacing a step leads one stride down, as in diffusers, which is not always the next
    timestep. With linspace diffusers does so too, but the timesteps lie further apart than its stride, so that latents
    would arrive at a noisier level than the denoiser is told next; here a step leads to the next timestep.
    """
    n = len(bars)
    timesteps = _grid(n, steps, steps, spacing, int(config.get("steps_offset", 0)))
    return timesteps, [*timesteps[1:], -1] if spacing == "linspace" else [t - n // steps for t in timesteps]


def sigma_steps(
    config: Mapping[str, Any], bars: Tensor, steps: int, solver: str, spacing: str
) -> tuple[list[float], list[float]]:
    """The timesteps of Euler and DPM-Solver++, and their sigma / alpha, with the one where sampling ends: (steps + 1).

    Raises UserError for more steps than there are levels.
    """
    n, multistep = len(bars), solver == "dpmpp_2m"
    table = ((1 - bars) / bars).sqrt().tolist()  # ascending
    offset = int(config.get("steps_offset", 0))
    timesteps: list[float]
    if spacing == "linspace" and not multistep:  # Euler's are not rounded
        timesteps = [(n - 1) * i / max(steps - 1, 1) for i in reversed(range(steps))]
    else:
        timesteps = [*_grid(n, steps, steps + 1 if multistep else steps, spacing, offset)]
    sigmas = [_between(table, t) for t in timesteps]
    if multistep:
        lowest = -math.log(table[-1])  # the smallest log(alpha / sigma)
        if (config.get("lambda_min_clipped") or lowest) > lowest:
            _refuse_unless(config, "lambda_min_clipped", (), solver)
    respaced = None
    if config.get("use_karras_sigmas"):
        respaced = _respaced(config, table if multistep else sigmas[::-1], steps, KARRAS_RHO)
    elif multistep and config.get("use_lu_lambdas"):
        respaced = _respaced({}, table, steps, None)
    if respaced is not None:
        sigmas, timesteps = respaced, [_timestep_of(sigma, table) for sigma in respaced]
        timesteps = [round(t) for t in timesteps] if multistep else timesteps
    elif multistep and len(set(timesteps)) < steps:
        raise UserError(f"sampler.steps is {steps}, which is more than sampler.solver={solver} has timesteps for")
    last = table[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return timesteps, [*sigmas, last]


def _grid(n: int, steps: int, points: int, spacing: str, offset: int) -> list[int]:
    # in numpy's order of operations, as in diffusers: where a timestep falls on a half, its last bit decides
    if spacing == "trailing":
        stride = (n - n / steps) - n
        return [round(n + i * stride) - 1 for i in range(steps)]
    if spacing == "linspace":
        stride = (n - 1) / max(points - 1, 1)
        return [round(i * stride) for i in range(points)][::-1][:steps]
    if spacing == "leading":
        timesteps = [i * (n // points) + offset for i in range(points)][::-1][:steps]
        if timesteps[0] >= n:
            raise UserError(
                f"sampler.steps={steps} with the model's steps_offset={offset} reaches timestep "
                f"{timesteps[0]} of {n}; use fewer steps or sampler.spacing=trailing"
            )
        return timesteps
    raise UserError(f"the model's scheduler has timestep_spacing '{spacing}'; choose {', '.join(SPACINGS)}")


def _between(table: list[float], t: float) -> float:
    low = min(math.floor(t), len(table) - 1)
    high = min(low + 1, len(table) - 1)
    return table[low] + (t - low) * (table[high] - table[low])


def _respaced(config: Mapping[str, Any], ascending: list[float], steps: int, rho: float | None) -> list[float]:
    """Sigmas evenly spaced in sigma^(1/rho), or in their logarithm, from the largest to the smallest."""
    low, high = config.get("sigma_min"), config.get("sigma_max")
    low, high = ascending[0] if low is None else float(low), ascending[-1] if high is None else float(high)
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    if rho is None:
        return [math.exp(math.log(high) + r * (math.log(low) - math.log(high))) for r in ramp]
    return [(high ** (1 / rho) + r * (low ** (1 / rho) - high ** (1 / rho))) ** rho for r in ramp]


def _timestep_of(sigma: float, table: list[float]) -> float:
    """Where a sigma lies in the table, linearly in its logarithm."""
    for low, (below, above) in enumerate(pairwise(table)):
        if sigma <= above or low == len(table) - 2:
            return low + min(max(math.log(sigma / below) / math.log(above / below), 0.0), 1.0)
    raise ValueError("a schedule has at least two levels")
