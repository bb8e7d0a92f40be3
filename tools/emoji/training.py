"""What the trainings share: a clock, atomic checkpoints, an average of the weights, progress on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Clock:
    """A budget in seconds that survives restarts; the learning rate follows it, not the step count."""

    budget: float
    used: float = 0.0
    last: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        now = time.monotonic()
        self.used += now - self.last
        self.last = now

    @property
    def progress(self) -> float:
        return min(self.used / self.budget, 1.0) if self.budget > 0 else 1.0

    def rate(self, peak: float, step: int, warmup: int = 200, hold: float = 0.6) -> float:
        """Linear warm-up, constant up to `hold` of the budget, then linear to 2%."""
        decay = 1.0 if self.progress < hold else 1 - 0.98 * (self.progress - hold) / (1 - hold)
        return peak * min(1.0, (step + 1) / warmup) * decay


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that an interruption leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def restore(path: Path) -> dict | None:
    """The last checkpoint (tensors and plain values only), or None."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Average:
    """Exponential moving average of a module's parameters, with a warm-up of its decay."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.parameters = list(module.parameters())
        self.values = [p.detach().clone() for p in self.parameters]
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Exchange the module's weights with the average; calling it twice changes nothing."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data, value.data = value.data, parameter.data


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def report(stage: str, clock: Clock, step: int, speed: float, **values: float) -> None:
    """One progress line with the time left."""
    left = max(clock.budget - clock.used, 0) / 60
    numbers = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
    line = f"{time.strftime('%H:%M:%S')} {stage}: step {step}  {left:.1f} min left  {speed:.0f} images/s  {numbers}"
    print(line, file=sys.stderr, flush=True)
