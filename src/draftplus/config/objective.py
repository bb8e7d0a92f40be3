"""The keys of the objective, and the settings of its methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftplus.config.facts import key as _key


@dataclass
class DraftLvConfig:
    samples: int = _key(2, "number of re-noised copies of x_0 per image", above=0)


@dataclass
class ReflConfig:
    first: float = _key(
        0.75, "the trained step is drawn from this fraction of the trajectory onwards, in [0, 1)", at_least=0, below=1
    )
    hinge: float | None = _key(None, "use the loss ReLU(hinge - reward) instead of -reward; null: no hinge")


@dataclass
class AlignpropConfig:
    min_steps: int = _key(1, "fewest steps with gradient; K is drawn uniformly from [min_steps, max_steps]", above=0)
    max_steps: int | None = _key(None, "most steps with gradient; null: all steps", above=0)


@dataclass
class DrtuneConfig:
    early_stop: int = _key(0, "leave out a random number of the last steps, up to this many", at_least=0)


@dataclass
class DdpoConfig:
    eta: float = _key(
        1.0, "DDIM noise in the rollouts, above 0 and at most 1; sampler.eta applies to all other images", above=0,
        at_most=1, hint="because at 0 sampling is deterministic and there are no probabilities to learn from",
    )  # fmt: skip
    inner_epochs: int = _key(1, "passes over each batch of rollouts", above=0)
    updates: int = _key(1, "optimizer updates per pass, each on its own part of the batch", above=0)
    clip: float = _key(1e-4, "the probability ratio is clipped to [1 - clip, 1 + clip]", above=0)
    adv_clip: float = _key(5.0, "advantages are clipped to [-adv_clip, adv_clip]", above=0)
    history: int | None = _key(
        16, "how many of a prompt's latest rewards normalise its advantages; null: use the batch only"
    )
    min_history: int = _key(
        16, "the batch's rewards are used until a prompt has this many", at_least=2,
        hint="because a standard deviation needs at least 2 rewards",
    )  # fmt: skip


@dataclass
class ObjectiveConfig:
    method: str = _key("draft", "draft | draft_lv | refl | alignprop | drtune | ddpo", in_method_name=True)
    grad_steps: Any = _key(1, 'K, how many steps carry gradient, or "all"', in_method_name=True)
    kl_coeff: float = _key(0.0, "weight of the KL term; a value above 0 gives DRaFT+", at_least=0, in_method_name=True)
    kl_space: str = _key(
        "noise",
        "what the KL term compares: predicted noises, clean latents, or velocities (flow matching alone)",
        choices=("noise", "x0", "velocity"),
        in_method_name=True,
    )
    kl_steps: str = _key(
        "window", "where the KL term looks: at the steps with gradient, or at steps of the whole trajectory too",
        choices=("window", "trajectory"), in_method_name=True, added=True,
    )  # fmt: skip
    kl_draws: int = _key(
        1, "how many steps without gradient kl_steps=trajectory looks at, drawn anew for each optimizer step", above=0,
        added=True,
    )  # fmt: skip
    kl_weights: str = _key(
        "uniform", "how those steps are weighted: alike, by their noise level, or as in the KL divergence of paths",
        choices=("uniform", "noise_level", "path"), in_method_name=True, added=True,
    )  # fmt: skip
    kl_prefix_coeff: float | None = _key(
        None, "weight of the term at those steps; null: kl_coeff", at_least=0, in_method_name=True, added=True
    )
    gate: float = _key(
        0.0, "the frozen model draws this fraction of the sampling steps, the first ones, in training and afterwards",
        at_least=0, below=1, in_method_name=True, added=True,
    )  # fmt: skip
    draft_lv: DraftLvConfig = _key(DraftLvConfig, "settings of method draft_lv")
    refl: ReflConfig = _key(ReflConfig, "settings of method refl")
    alignprop: AlignpropConfig = _key(AlignpropConfig, "settings of method alignprop")
    drtune: DrtuneConfig = _key(DrtuneConfig, "settings of method drtune")
    ddpo: DdpoConfig = _key(DdpoConfig, "settings of method ddpo")
