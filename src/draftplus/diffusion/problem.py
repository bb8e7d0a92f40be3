"""What stays the same over a run, and what an optimizer step looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.diffusion.sampler import Sampler, Visit
from draftplus.diffusion.window import Window
from draftplus.types import Model, Scorer, Scores

Noise = Callable[[str, int], Tensor]  # (stream, draw) -> standard normal (b, c, h, w) on the model's device


@dataclass(frozen=True)
class Problem:
    """How images are made, how they are scored, and what is optimised."""

    sampler: Sampler
    scorer: Scorer
    objective: ObjectiveConfig

    @property
    def model(self) -> Model:
        return self.sampler.model


@dataclass(frozen=True)
class StepPlan:
    """What an optimizer step does with the sampling steps, the same on every rank.

    window: which carry gradient. looks: where each regulariser looks, by its name, with a factor for each step.
    """

    window: Window
    looks: Mapping[str, Mapping[int, float]]

    @property
    def keep(self) -> frozenset[int]:
        """Steps that carry no gradient and that a regulariser looks at."""
        return frozenset(step for steps in self.looks.values() for step in steps) - set(self.window.steps)


class Estimated(NamedTuple):
    """A method's loss without regularisers, and what it was made of.

    value: (). scores: (b,) each. images: (b, 3, H, W). visits: the steps that carried gradient.
    """

    value: Tensor
    scores: Scores
    images: Tensor
    visits: list[Visit]
