"""Numbers and settings in words."""

from __future__ import annotations

import math
from typing import Any

from draftplus.config import flatten
from draftplus.diffusion.methods import METHODS


def method_label(method: str) -> str:
    """A method's name as the papers write it; a name that is not known as it is."""
    return METHODS[method].label if method in METHODS else method


def method_in_words(config: dict[str, Any], last_sigma: float | None = None) -> str:
    """The method in words, such as 'DRaFT+: gradient through the last step of 10, ...'.

    last_sigma: the noise level of the last sampling step, where it is known.
    """
    flat = flatten(config)
    method = str(flat.get("objective.method", ""))
    if not method:
        return "The method is unknown."
    name, steps, k = method_label(method), flat.get("sampler.steps"), flat.get("objective.grad_steps")
    coefficient = flat.get("objective.kl_coeff") or 0
    differentiates = method not in METHODS or METHODS[method].differentiates
    if coefficient > 0:
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
    if coefficient > 0:
        parts.append(f"KL coefficient β = {coefficient:g} in {flat.get('objective.kl_space')} space")
    else:
        parts.append("no KL term")
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
