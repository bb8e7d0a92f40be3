"""A run whose first gradient is none, or rounding, is refused: Adam would make full-size updates of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.config import Config, ObjectiveConfig, SamplerConfig
from draftplus.config.objective import AlignpropConfig, DrtuneConfig, ReflConfig
from draftplus.diffusion.methods import METHODS, check_windows
from draftplus.diffusion.objectives import loss, plan_around, prefix
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.window import Window, last, single, spaced
from draftplus.errors import UserError
from draftplus.models.stable_diffusion import StableDiffusion
from tests.support.runs import rows, train_here, weights
from tests.tiny import PROMPTS, SCHEDULER, noise_source, problem

STILL = {**SCHEDULER, "timestep_spacing": "linspace"}  # its last step leads from timestep 0 to the level of timestep 0
TOTAL = 5

FROM_ROUNDING = {
    "draft": ObjectiveConfig("draft", 1),
    "draft_lv": ObjectiveConfig("draft_lv", 1),
    "alignprop": ObjectiveConfig("alignprop", 1),
    "drtune": ObjectiveConfig("drtune", 1),
    "drtune that may stop early": ObjectiveConfig("drtune", 1, drtune=DrtuneConfig(early_stop=1)),
}
FROM_MORE = {
    "draft": ObjectiveConfig("draft", 2),
    "all": ObjectiveConfig("draft", "all"),
    "refl": ObjectiveConfig("refl", 1, refl=ReflConfig(first=0.9)),
    "alignprop": ObjectiveConfig("alignprop", 1, alignprop=AlignpropConfig(2, None)),
    "drtune": ObjectiveConfig("drtune", 2),
    "ddpo": ObjectiveConfig("ddpo", "all"),
}


def configured(objective: ObjectiveConfig, **sampler: Any) -> Config:
    return Config(objective=objective, sampler=SamplerConfig(**sampler))


@pytest.mark.parametrize("name", FROM_ROUNDING)
@pytest.mark.parametrize(
    ("settings", "solver", "remedy"),
    [
        (STILL, "ddim", "sampler.spacing=trailing"),
        ({**SCHEDULER, "steps_offset": 0}, "auto", "sampler.spacing=trailing"),
        ({**STILL, "final_sigmas_type": "sigma_min"}, "euler", "sampler.solver=ddim sampler.spacing=trailing"),
        (
            {**SCHEDULER, "final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
            "dpmpp_2m",
            "sampler.solver=ddim sampler.spacing=trailing",
        ),
    ],
    ids=lambda value: str(value)[:5],
)
def test_a_method_that_may_learn_from_a_still_step_alone(
    name: str, settings: dict[str, Any], solver: str, remedy: str
) -> None:
    schedule, _ = make_schedule(settings, TOTAL, solver)
    assert [step.is_still for step in schedule.steps] == [False] * (TOTAL - 1) + [True]
    for seed in range(3):
        config = replace(configured(FROM_ROUNDING[name], solver=solver), seed=seed)
        with pytest.raises(UserError) as error:
            check_windows(config, schedule)
        said = str(error.value)
        assert f"objective.method={config.objective.method} " in said and "step 5 of 5" in said
        assert said.endswith(f"use {remedy}") and "set_alpha_to_one: false" in said and "\n" not in said
    spaced_otherwise = make_schedule({**settings, "steps_offset": 1}, TOTAL, "ddim", "trailing")[0]
    check_windows(configured(FROM_ROUNDING[name]), spaced_otherwise)  # the remedy is one


@pytest.mark.parametrize("name", FROM_MORE)
def test_a_window_with_another_step_learns_from_that(name: str) -> None:
    check_windows(configured(FROM_MORE[name]), make_schedule(STILL, TOTAL)[0])


def test_trailing_with_every_timestep_ends_still_too() -> None:
    schedule, _ = make_schedule({**SCHEDULER, "num_train_timesteps": 20}, 20, "ddim", "trailing")
    with pytest.raises(UserError, match=r"use fewer sampler\.steps"):
        check_windows(configured(FROM_ROUNDING["draft"], spacing="trailing"), schedule)


@pytest.mark.parametrize(
    ("method", "window", "learns"),
    [
        ("draft", last(1, TOTAL), False),
        ("draft", last(2, TOTAL), True),
        ("refl", single(TOTAL - 1), True),
        ("drtune", spaced(1, TOTAL, TOTAL - 1, 0), False),
        ("drtune", spaced(1, TOTAL, TOTAL - 1, 1), True),
        ("drtune", spaced(2, TOTAL, 1, 0), True),
    ],
)
def test_what_is_refused_has_no_gradient_and_what_is_not_has(
    model: StableDiffusion, method: str, window: Window, learns: bool
) -> None:
    setting = problem(model, ObjectiveConfig(method, 1), TOTAL, scheduler=STILL)
    noise, given = noise_source(3), model.encode(PROMPTS)
    planned = plan_around(window, setting.objective, setting.sampler.schedule)
    start = prefix(setting, given, noise, planned)
    found = loss(setting, start, planned, given, PROMPTS, noise)
    parameters = list(model.tuned.trainable().values())
    gradients = torch.autograd.grad(found.value, parameters, allow_unused=True)
    norm = float(torch.stack([g.norm() for g in gradients if g is not None]).norm())
    assert norm > 1e-3 if learns else norm < 1e-12
    still = {index for index, step in enumerate(setting.sampler.schedule.steps) if step.is_still}
    assert METHODS[method].differentiates and still == {TOTAL - 1}


def test_the_command_refuses_it_before_training(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sampling step 3 of 3 alone.*use sampler\.spacing=trailing"):
        train_here(settings, "sampler.spacing=linspace")
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()
    train_here(settings, "sampler.spacing=linspace", "objective.grad_steps=2", "train.steps=1")


@pytest.mark.parametrize("slope", [0.0, 1e-12])
@pytest.mark.parametrize("more", [[], ["model.lora=null"], ["objective.method=refl"]], ids=str)
def test_a_gradient_that_is_none_ends_the_run(
    settings: list[str], tmp_path: Path, slope: float, more: Sequence[str]
) -> None:
    with pytest.raises(UserError, match=r"gradient of the first step has norm .* nothing but rounding") as error:
        train_here(settings, *more, reward="flat", slope=slope)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("reward", "more"),
    [
        (
            "flat",
            ["objective.method=ddpo", "objective.grad_steps=all"],
        ),  # no image beats another
        ("redness", ["objective.method=refl", "objective.refl.hinge=-100"]),  # every reward is beyond it
    ],
)
def test_a_gradient_that_may_be_none(settings: list[str], reward: str, more: Sequence[str]) -> None:
    run = train_here(settings, *more, "train.steps=1", "checkpoint.every=1", reward=reward)
    assert rows(run / "metrics.jsonl")[0]["grad_norm"] == 0


def test_the_adapters_zero_start_is_no_missing_gradient(settings: list[str]) -> None:
    """B is 0 at first, so that A has no gradient then; B has."""
    run = train_here(settings, "train.steps=1", "checkpoint.every=1", "optim.weight_decay=0")
    assert rows(run / "metrics.jsonl")[0]["grad_norm"] > 0
    state = weights(run / "checkpoints" / "step-000001")
    moments = {name: tensor for name, tensor in state.items() if "exp_avg/" in name}
    assert all(not tensor.any() for name, tensor in moments.items() if "lora_A" in name)
    assert any(tensor.any() for name, tensor in moments.items() if "lora_B" in name)
