"""Which images to make, and the settings that trade reward for diversity; known before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftplus.diffusion.annealing import anneal_weights
from draftplus.errors import UserError


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int


def jobs_of(prompts: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every prompt with every seed, a prompt's images next to one another."""
    return [Job(prompt, seed) for prompt in prompts for seed in seeds]


@dataclass(frozen=True)
class Knobs:
    """Settings that trade reward for diversity when images are made, without training.

    lora_scale: the adapter's effect, 0 is the base model and 1 the tuned one. anneal: a schedule of annealed importance
    guidance, such as `power:2`; None: the tuned model at every step from its gate on.
    """

    lora_scale: float = 1.0
    anneal: str | None = None

    @property
    def label(self) -> str:
        """Such as `lora_scale=0.5`; empty if all knobs have their defaults."""
        scale = [] if self.lora_scale == 1 else [f"lora_scale={self.lora_scale:g}"]
        return ", ".join([*scale, *([] if self.anneal is None else [f"anneal={self.anneal}"])])

    def check(self) -> None:
        """Raises UserError as `weights` does, before a model is loaded."""
        self.weights(1)

    def weights(self, steps: int) -> list[float]:
        """The tuned model's share at each of the sampling steps.

        Raises UserError for a schedule that does not exist, or a scale that is not finite.
        """
        if not math.isfinite(self.lora_scale):
            raise UserError(f"lora_scale is {self.lora_scale}; it must be finite: 0 is the base model, 1 the tuned one")
        share = anneal_weights(self.anneal, steps) if self.anneal is not None else [1.0] * steps
        return share if self.lora_scale != 0 else [0.0] * steps


TUNED = Knobs()
