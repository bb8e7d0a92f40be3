"""The optimizer, its learning rate, clipping, and the moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.config.schema import OptimConfig
from draftplus.distributed.sharding import own, part_of, whole
from draftplus.errors import UserError, notice

Parameters = Mapping[str, nn.Parameter]
CODES = ("qmap1", "qmap2")  # of bitsandbytes: the same for all parameters and runs, made anew


def make_optimizer(parameters: Parameters, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration over all trained parameters.

    adamw: Loshchilov and Hutter 2019, arXiv 1711.05101; on CUDA in one kernel. adamw_8bit: the same with its moments in
    8 bits, each block of 256 with a scale of its own (Dettmers et al. 2021, arXiv 2110.02861), of bitsandbytes.
    adafactor: Shazeer and Stern 2018, arXiv 1804.04235, as in PyTorch; no first moment, and of a matrix's second the
    means of its rows and columns.

    Raises UserError where the package that it needs is absent.
    """
    trained, first, second = list(parameters.values()), *config.betas
    if config.name == "adafactor":
        return torch.optim.Adafactor(trained, lr=config.lr, weight_decay=config.weight_decay)
    given: dict[str, Any] = {"lr": config.lr, "betas": (first, second), "weight_decay": config.weight_decay}
    if config.name == "adamw_8bit":
        if find_spec("bitsandbytes") is None:
            raise UserError(
                "optim.name is adamw_8bit, which needs bitsandbytes; run: pip install 'draftplus[quantize]'"
            )
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(trained, **given)
        return made
    fused = True if all(parameter.is_cuda for parameter in trained) else None
    return torch.optim.AdamW(trained, **given, fused=fused)


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of the update after `step` complete ones: a linear rise over the warm-up, then constant or a fall to 0."""
    rate = config.lr * min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.decay_steps is None:
        return rate
    return rate * min(1.0, max(0.0, 1 - (step - config.warmup_steps) / config.decay_steps))


def tell_of_idle_steps(config: OptimConfig, total: int) -> None:
    """One line where the learning rate is 0 before the last of `total` steps is taken."""
    if config.decay_steps is not None and total > (end := config.warmup_steps + config.decay_steps):
        notice(
            f"the learning rate is 0 from step {end + 1} on, where optim.decay_steps={config.decay_steps} ends, so the "
            f"steps up to {total} change nothing; to train longer, start a run with a larger optim.decay_steps"
        )


def gradient_norm(parameters: Parameters, limit: float | None) -> float:
    """The Euclidean norm over all gradients, which are then scaled down to `limit` if they exceed it."""
    return float(whole(nn.utils.clip_grad_norm_(parameters.values(), float("inf") if limit is None else limit)))


@torch.no_grad()
def parameter_norm(parameters: Parameters) -> float:
    """The Euclidean norm over all parameters."""
    return float(whole(nn.utils.get_total_norm(parameters.values())))


def optimizer_tensors(parameters: Parameters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name."""
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in CODES
    }


def load_optimizer_tensors(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    """Restores what `optimizer_tensors` gave, whole tensors or parts."""
    init: Callable[..., None] | None = getattr(optimizer, "init_state", None)  # bitsandbytes'
    group = optimizer.param_groups[0]
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if init is not None and not state:
            init(group, parameter, 0, next(i for i, one in enumerate(group["params"]) if one is parameter))
        if key == "step":
            state[key] = int(tensor) if init is not None else _as_counted(group, tensor, parameter)
        else:
            state[key] = part_of(parameter, tensor)


def _as_counted(group: Mapping[str, Any], step: Tensor, parameter: Tensor) -> Tensor:
    return step.to(parameter.device) if group.get("fused") else step  # where its kernel counts


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
            own(self.shadow[name]).lerp_(own(parameter.detach()), 1 - decay)

    @contextmanager
    def applied(self, parameters: Parameters) -> Iterator[None]:
        """Inside, the parameters hold the average; bit-identical afterwards."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():  # in place: whoever gathers parts knows where they lie
            mine, average = own(parameter), own(self.shadow[name])
            before = mine.clone()
            mine.copy_(average)
            average.copy_(before)
