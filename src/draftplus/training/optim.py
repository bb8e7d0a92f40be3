"""AdamW, its learning rate, clipping, and the moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from draftplus.config.schema import OptimConfig

Parameters = Mapping[str, nn.Parameter]


def make_optimizer(parameters: Parameters, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over all trained parameters."""
    first, second = config.betas
    return torch.optim.AdamW(parameters.values(), lr=config.lr, betas=(first, second), weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of the update after `step` complete ones: a linear rise over the warm-up, then constant or a fall to 0."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay_steps is None:
        return rate
    return rate * min(1.0, max(0.0, 1 - (step - config.warmup_steps) / config.decay_steps))


def gradient_norm(parameters: Parameters, limit: float | None) -> float:
    """The Euclidean norm over all gradients, which are then scaled down to `limit` if they exceed it."""
    return float(nn.utils.clip_grad_norm_(parameters.values(), float("inf") if limit is None else limit))


@torch.no_grad()
def parameter_norm(parameters: Parameters) -> float:
    """The Euclidean norm over all parameters."""
    return float(nn.utils.get_total_norm(parameters.values()))


def optimizer_tensors(parameters: Parameters, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state by name."""
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    parameters: Parameters,
    optimizer: torch.optim.AdamW,
    tensors: Mapping[str, Tensor],
    scatter: Callable[[str, Tensor], Tensor],
) -> None:
    """Restores what `optimizer_tensors` gave. scatter: from a parameter's whole tensor to this process's part."""
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = tensor if key == "step" else scatter(name, tensor).to(parameter)


class Ema:
    """An exponential moving average of the trained weights, with decay warm-up min(decay, (1 + n) / (10 + n))."""

    def __init__(self, parameters: Parameters, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Parameters) -> None:
        """Moves the average towards the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, parameter in parameters.items():
            self.shadow[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self, parameters: Parameters) -> Iterator[None]:
        """Inside, the parameters hold the average; bit-identical afterwards."""
        originals = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self.shadow[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = originals[name]
