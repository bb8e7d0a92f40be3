"""The family of methods as values: a window, an estimator, and what follows from them.

DRaFT, DRaFT-K, DRaFT-LV: Clark et al. 2023 (arXiv 2309.17400). ReFL: Xu et al. 2023 (arXiv 2304.05977). AlignProp:
Prabhudesai et al. 2023 (arXiv 2310.03739). DRTune: Wu et al. 2024 (arXiv 2405.00760). DDPO: Black et al. 2023
(arXiv 2305.13301). DRaFT+ is any of these with the KL term of `draftplus.diffusion.regularisers`.

A new method is an entry of `METHODS`. Planning, `--dry-run`, the checks of a configuration and the report read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftplus.config import Config, ObjectiveConfig, nearest
from draftplus.diffusion import window as windows
from draftplus.diffusion.window import Window
from draftplus.errors import UserError

if TYPE_CHECKING:  # configurations are checked without torch
    from draftplus.diffusion.estimators import Estimator
    from draftplus.diffusion.schedule import Schedule


def _nothing_to_check(config: Config, total: int) -> None:
    pass


def _no_copies(objective: ObjectiveConfig) -> int:
    return 0


def _one_pass(objective: ObjectiveConfig) -> int:
    return 1


@dataclass(frozen=True)
class Method:
    """One way to learn from a reward.

    label: its name in reports. window: (objective, schedule, seed, optimizer step) -> the steps that carry gradient,
    the same on every rank. estimator: from the trajectory to the loss, a function or the name of one in
    `draftplus.diffusion.estimators`; None: the clipped policy gradient on each step's log-probability
    (`draftplus.diffusion.policy`), which needs no gradient of the reward. words: its description in the report of a
    run, where {k} is the number of steps with gradient, {last} such as "the last of 10", {steps} the number of sampling
    steps and {copies} that of DRaFT-LV's copies. copies: passes with gradient per image in addition to the steps of its
    window. repeats: how often each pass with gradient is made. check: (config, number of sampling steps) -> UserError
    for settings that do not fit.
    """

    label: str
    window: Callable[[ObjectiveConfig, Schedule, int, int], Window]
    estimator: Estimator | str | None = "final_image"
    words: str = "gradient through {k} of {steps} sampling steps"
    copies: Callable[[ObjectiveConfig], int] = _no_copies
    repeats: Callable[[ObjectiveConfig], int] = _one_pass
    check: Callable[[Config, int], None] = _nothing_to_check

    @property
    def differentiates(self) -> bool:
        """Whether it needs the gradient of the reward."""
        return self.estimator is not None

    @property
    def estimate(self) -> Estimator | None:
        """From the trajectory to the loss."""
        if not isinstance(self.estimator, str):
            return self.estimator
        from draftplus.diffusion import estimators

        named: Estimator = getattr(estimators, self.estimator)
        return named


def gated_steps(gate: float, total: int) -> int:
    """How many of the sampling steps the frozen model draws: the nearest number to that fraction that leaves one."""
    return min(math.floor(gate * total + 0.5), total - 1)


def grad_steps(objective: ObjectiveConfig, total: int) -> int:
    """K, with `all` resolved: the steps that the gate leaves."""
    return total - gated_steps(objective.gate, total) if objective.grad_steps == "all" else int(objective.grad_steps)


def _last(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> Window:
    return windows.last(grad_steps(objective, len(schedule)), len(schedule))


def _late(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> Window:
    from draftplus import rng

    total = len(schedule)
    first = max(min(int(objective.refl.first * total), total - 1), gated_steps(objective.gate, total))
    return windows.single(rng.integer(first, total, seed, "refl", step))


def _random_length(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> Window:
    from draftplus import rng

    settings, total = objective.alignprop, len(schedule)
    high = settings.max_steps or total - gated_steps(objective.gate, total)
    return windows.last(rng.integer(settings.min_steps, high + 1, seed, "alignprop", step), total)


def _spaced(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> Window:
    from draftplus import rng

    total = len(schedule)
    k, gate = grad_steps(objective, total), gated_steps(objective.gate, total)
    skipped = rng.integer(0, objective.drtune.early_stop + 1, seed, "drtune/stop", step)
    return windows.spaced(k, total, rng.integer(0, (total - gate) // k, seed, "drtune/offset", step), skipped, gate)


def _drawn(objective: ObjectiveConfig, schedule: Schedule, seed: int, step: int) -> Window:
    from draftplus.diffusion.solvers import random_steps

    gate = gated_steps(objective.gate, len(schedule))
    return Window(tuple(index for index in random_steps(schedule, objective.ddpo.eta) if index >= gate))


def _check_one_step(config: Config, total: int) -> None:
    if config.objective.grad_steps != 1:
        raise UserError(
            f"objective.grad_steps is {config.objective.grad_steps}, but method {config.objective.method} has only one "
            "step with gradient; set objective.grad_steps=1"
        )


def _check_alignprop(config: Config, total: int) -> None:
    if config.objective.grad_steps != 1:
        raise UserError(
            f"objective.grad_steps is {config.objective.grad_steps}, but method alignprop draws the number of steps "
            "with gradient; set objective.grad_steps=1 and use objective.alignprop.min_steps and max_steps"
        )
    low, high = config.objective.alignprop.min_steps, config.objective.alignprop.max_steps
    tuned = total - gated_steps(config.objective.gate, total)
    if not low <= (high or tuned) <= tuned:
        most = f"sampler.steps={total}" if tuned == total else f"{tuned}, the steps that objective.gate leaves"
        raise UserError(
            f"objective.alignprop.min_steps is {low} and max_steps is {'null' if high is None else high}; choose them "
            f"so that min_steps <= max_steps <= {most}"
        )


def _check_drtune(config: Config, total: int) -> None:
    tuned = total - gated_steps(config.objective.gate, total)
    if config.objective.drtune.early_stop >= tuned:
        most = (
            f"sampler.steps, which is {total}" if tuned == total else f"{tuned}, the steps that objective.gate leaves"
        )
        raise UserError(f"objective.drtune.early_stop is {config.objective.drtune.early_stop}; it must be below {most}")


def _check_ddpo(config: Config, total: int) -> None:
    settings = config.objective.ddpo
    if settings.history is not None and settings.history < settings.min_history:
        better = f"min_history={settings.history}" if settings.history > 1 else f"history={settings.min_history}"
        raise UserError(
            f"objective.ddpo.history is {settings.history}, but min_history is {settings.min_history}, which it would "
            f"never reach; set objective.ddpo.{better}, or objective.ddpo.history=null"
        )
    if config.objective.grad_steps not in (1, "all"):
        raise UserError(
            f"objective.grad_steps is {config.objective.grad_steps}, but method ddpo learns from all steps; "
            f"set objective.grad_steps=all"
        )
    if config.train.global_batch_size == 1:
        raise UserError(
            "train.global_batch_size is 1, but method ddpo compares rewards within a batch; set it to at least 2, such "
            "as 64"
        )


METHODS: dict[str, Method] = {
    "draft": Method("DRaFT", _last, words="gradient through {last} sampling steps"),
    "draft_lv": Method(
        "DRaFT-LV",
        _last,
        "renoised",
        words="gradient through the last of {steps} sampling steps and {copies} re-noised copies",
        copies=lambda objective: objective.draft_lv.samples,
        check=_check_one_step,
    ),
    "refl": Method(
        "ReFL",
        _late,
        "hinged",
        words="gradient through one random late step of {steps}",
        check=_check_one_step,
    ),
    "alignprop": Method(
        "AlignProp",
        _random_length,
        words="gradient through a random number of the last of {steps} sampling steps",
        check=_check_alignprop,
    ),
    "drtune": Method(
        "DRTune",
        _spaced,
        words="gradient through {k} evenly spaced of {steps} sampling steps",
        check=_check_drtune,
    ),
    "ddpo": Method(
        "DDPO",
        _drawn,
        estimator=None,
        words="policy gradient over {steps} sampling steps",
        repeats=lambda objective: objective.ddpo.inner_epochs,
        check=_check_ddpo,
    ),
}


def learns_from_the_end(config: Config, schedule: Schedule) -> bool:
    """Whether the last sampling step is the only one that ever carries gradient."""
    method, last = METHODS[config.objective.method], windows.last(1, len(schedule)).steps
    draws = range(100 * len(schedule))  # those that are drawn are drawn often enough to see each of them
    return all(method.window(config.objective, schedule, config.seed, draw).steps == last for draw in draws)


def check_windows(config: Config, schedule: Schedule) -> None:
    """Refuses a method that may learn from still steps alone, through which its loss has no gradient but rounding.

    A window that has another step too learns from that one, through the still step, and is left alone; so is one that
    ends with a prediction of x_0. Windows that are drawn are drawn often enough to see each of them.

    Raises UserError that names the keys and a remedy.
    """
    still = {index for index, step in enumerate(schedule.steps) if step.is_still}
    if not still:
        return
    name, total = config.objective.method, len(schedule)
    for draw in range(100 * total):
        window = METHODS[name].window(config.objective, schedule, config.seed, draw)
        if still.issuperset(window.steps) and window.x0_at not in window.steps:
            at = window.steps[-1]
            remedy = "fewer sampler.steps" if config.sampler.spacing == "trailing" else "sampler.spacing=trailing"
            if config.sampler.solver not in ("auto", "ddim"):
                remedy = "sampler.solver=ddim sampler.spacing=trailing"
            raise UserError(
                f"objective.method={name} may learn from sampling step {at + 1} of {total} alone, which leads back to "
                "the noise level that it comes from, so that its gradient is rounding (set_alpha_to_one: false or "
                "final_sigmas_type: sigma_min in the model's scheduler_config.json, with this spacing); "
                f"use {remedy}"
            )


def check_method(config: Config, total: int) -> None:
    """Refuses settings that do not fit the method, or the number of sampling steps.

    Raises UserError that names the key, its value and a remedy.
    """
    k, name = config.objective.grad_steps, config.objective.method
    if name not in METHODS:
        near = nearest(name, list(METHODS))
        raise UserError(
            f"objective.method is '{name}'; {near + ' Choose' if near else 'choose'} one of: {', '.join(METHODS)}"
        )
    if k != "all" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise UserError(f"objective.grad_steps is {k!r}; give a number from 1 to {total}, or all")
    if k != "all" and k > total:
        raise UserError(
            f"objective.grad_steps is {k}, but sampler.steps is {total}; set objective.grad_steps to at most {total}, "
            "or all"
        )
    if config.objective.kl_prefix_coeff and config.objective.kl_steps != "trajectory":
        raise UserError(
            f"objective.kl_prefix_coeff is {config.objective.kl_prefix_coeff:g}, but objective.kl_steps="
            f"{config.objective.kl_steps} looks at no step without gradient; set objective.kl_steps=trajectory"
        )
    _check_gate(config, total)
    METHODS[name].check(config, total)


def _check_gate(config: Config, total: int) -> None:
    objective, uses = config.objective, config.train.prefix_cache.uses
    gate, k = objective.gate, objective.grad_steps
    gated = gated_steps(gate, total)
    if gate > 0 and (gated == 0 or math.floor(gate * total + 0.5) >= total):
        raise UserError(
            f"objective.gate is {gate:g}, which is {'none' if gated == 0 else 'all'} of sampler.steps={total}; choose "
            f"{1 / total:.2g} to {(total - 1) / total:.2g}, or 0 for no gate"
        )
    if k != "all" and k > total - gated:
        raise UserError(
            f"objective.grad_steps is {k}, but objective.gate={gate:g} leaves {total - gated} of {total} steps to "
            f"train; set objective.grad_steps to at most {total - gated}, or all"
        )
    if uses > 1 and gated == 0:
        raise UserError(
            f"train.prefix_cache.uses is {uses}, but without a gate there is nothing to keep: all steps depend on what "
            "is trained; set objective.gate, such as 0.5, or train.prefix_cache.uses=1"
        )
    if uses > 1 and not METHODS[objective.method].differentiates:
        raise UserError(
            f"train.prefix_cache.uses is {uses}, but method {objective.method} needs new trajectories at every step; "
            "set train.prefix_cache.uses=1"
        )
