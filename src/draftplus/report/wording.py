"""Numbers and settings in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from draftplus.config import flatten
from draftplus.diffusion.methods import METHODS, gated_steps

# how the steps without gradient are weighted in the KL term, other than alike
KL_WEIGHTS = {"noise_level": ", weighted by noise level", "path": ", weighted as in the KL divergence of paths"}


def method_label(method: str) -> str:
    """A method's name as the papers write it; a name that is not known as it is."""
    return METHODS[method].label if method in METHODS else method


def kl_coefficients(flat: Mapping[str, Any]) -> tuple[float, float]:
    """The weights of the KL term: β of the steps with gradient, and λ of the others. flat: a configuration's keys."""
    window, prefix = flat.get("objective.kl_coeff") or 0.0, flat.get("objective.kl_prefix_coeff")
    if flat.get("objective.kl_steps") != "trajectory":
        return window, 0.0
    return window, window if prefix is None else prefix


def _kl_in_words(flat: Mapping[str, Any]) -> str:
    window, prefix = kl_coefficients(flat)
    space = f"in {flat.get('objective.kl_space')} space"
    if prefix <= 0:
        return f"KL coefficient β = {window:g} {space}" if window > 0 else "no KL term"
    draws = flat.get("objective.kl_draws")
    others = f"{draws} step{'s' * (draws != 1)} without, drawn anew each time"
    weights = KL_WEIGHTS.get(str(flat.get("objective.kl_weights")), "")
    if window > 0:
        both = f"β = {window:g} at the steps with gradient and λ = {prefix:g} at {others}{weights}"
        return f"KL coefficients {both}, {space}"
    return f"KL coefficient λ = {prefix:g} at {others.replace('without', 'without gradient')}{weights}, {space}"


def _gate_in_words(flat: Mapping[str, Any], steps: Any) -> list[str]:
    gate = flat.get("objective.gate") or 0
    if not gate:
        return []
    if not isinstance(steps, int):
        return [f"the frozen model draws the first {gate:g} of the steps"]
    first = gated_steps(gate, steps)
    return [f"the frozen model draws the first {f'{first} of {steps} steps' if first > 1 else f'of {steps} steps'}"]


def method_in_words(config: dict[str, Any], last_sigma: float | None = None) -> str:
    """The method in words, such as 'DRaFT+: gradient through the last step of 10, ...'.

    last_sigma: the noise level of the last sampling step, where it is known.
    """
    flat = flatten(config)
    method = str(flat.get("objective.method", ""))
    if not method:
        return "The method is unknown."
    name, steps, k = method_label(method), flat.get("sampler.steps"), flat.get("objective.grad_steps")
    gate = flat.get("objective.gate") or 0
    if gate and k == "all" and isinstance(steps, int):
        k = steps - gated_steps(gate, steps)
    differentiates = method not in METHODS or METHODS[method].differentiates
    if max(kl_coefficients(flat)) > 0:
        name = "DRaFT+" if method == "draft" else f"{name} with the KL term of DRaFT+" if differentiates else name
    last = f"all {steps}" if k in ("all", steps) else f"the last of {steps}" if k == 1 else f"the last {k} of {steps}"
    words = METHODS[method].words if method in METHODS else "gradient through {k} of {steps} sampling steps"
    copies = flat.get("objective.draft_lv.samples")
    rewards = config.get("reward")
    parts = [words.format(k=k, steps=steps, last=last, copies=copies)]
    if last_sigma is not None:
        parts.append(f"the last step at noise level σ = {last_sigma:.2g}")
    if isinstance(rewards, dict) and rewards:
        parts.append(f"reward {' + '.join(map(str, rewards))}")
    parts += [*_gate_in_words(flat, steps), _kl_in_words(flat)]
    rank = flat.get("model.lora.rank")
    parts.append(f"LoRA of rank {rank}" if rank is not None else "full fine-tuning")
    return f"{name}: {', '.join(parts)}, on the model {flat.get('model.path')}."


def show(value: float | None, *beside: float | None) -> str:
    """A number to four significant digits of the largest of it and those `beside` it; a dash for None."""
    if value is None:
        return "–"
    sizes = [abs(v) for v in (value, *beside) if v is not None and math.isfinite(v) and v != 0]
    return _fixed(value, 3 - math.floor(math.log10(max(sizes))) if sizes else 0)


def show_gain(gain: float | None, error: float | None = None) -> str:
    """A gain with its sign and, where there is one, its standard error to two significant digits."""
    if gain is None:
        return "–"
    spread = error is not None and math.isfinite(error) and error > 1e-6 * abs(gain)  # below that it is rounding
    scale = error if spread else abs(gain) / 10
    decimals = 1 - math.floor(math.log10(scale)) if scale and math.isfinite(scale) else 3
    sign = "+" if gain > 0 else ""
    return f"{sign}{_fixed(gain, decimals)}" + (f" ± {_fixed(error, decimals)}" if error is not None else "")


def _fixed(value: float, decimals: int) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{min(max(decimals, 0), 9)}f}".replace("-", "−")


def setting(value: Any) -> str:
    """A value of the configuration as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and value:
        return ", ".join(map(setting, value))
    return str(value) if value != "" else '""'
