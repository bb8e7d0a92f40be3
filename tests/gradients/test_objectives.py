"""Each objective's gradient is its frozen-part function's derivative: computed independently, and by differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.diffusion import window as windows
from draftplus.diffusion.objectives import Loss, loss, plan_around, prefix
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.window import Window
from draftplus.models.stable_diffusion import StableDiffusion
from tests.gradients.by_hand import ByHand, Case
from tests.tiny import PROMPTS, SCHEDULER, TinyScorer, gradients, noise_source, normal, problem, randomize, tiny_model

pytestmark = pytest.mark.slow

TOTAL = 5
HINGE = -2.0  # above some of the three rewards and below others
METHODS: dict[str, tuple[ObjectiveConfig, Window, Case]] = {
    "draft-1": (ObjectiveConfig("draft", 1), windows.last(1, TOTAL), Case("draft", (4,))),
    "draft-3": (ObjectiveConfig("draft", 3), windows.last(3, TOTAL), Case("draft", (2, 3, 4))),
    "draft-all": (ObjectiveConfig("draft", "all"), windows.last(5, TOTAL), Case("draft", (0, 1, 2, 3, 4))),
    "draft-3-eta": (ObjectiveConfig("draft", 3), windows.last(3, TOTAL), Case("draft", (2, 3, 4), eta=0.7)),
    "draft_lv": (ObjectiveConfig("draft_lv", 1), windows.last(1, TOTAL), Case("draft_lv", (4,))),
    "draft_lv-eta": (ObjectiveConfig("draft_lv", 1), windows.last(1, TOTAL), Case("draft_lv", (4,), eta=1.0)),
    "refl": (ObjectiveConfig("refl", 1), windows.single(3), Case("refl", (3,), x0_at=3)),
    "refl-hinge": (ObjectiveConfig("refl", 1), windows.single(2), Case("refl", (2,), x0_at=2, hinge=HINGE)),
    "alignprop": (ObjectiveConfig("alignprop", 1), windows.last(4, TOTAL), Case("alignprop", (1, 2, 3, 4))),
    "drtune": (ObjectiveConfig("drtune", 2), windows.spaced(2, TOTAL, 0, 0), Case("drtune", (1, 3))),
    "drtune-stop": (
        ObjectiveConfig("drtune", 2), windows.spaced(2, TOTAL, 0, 1), Case("drtune", (1, 3), x0_at=3),
    ),
}  # fmt: skip
PENALTIES = {"plain": (0.0, "noise"), "kl": (3.0, "noise"), "kl-x0": (3.0, "x0")}


def pick(method: str, penalty: str) -> tuple[ObjectiveConfig, Window, Case]:
    config, window, case = METHODS[method]
    coeff, space = PENALTIES[penalty]
    objective = ObjectiveConfig(config.method, config.grad_steps, kl_coeff=coeff, kl_space=space)
    objective.refl.hinge = case.hinge
    return objective, window, Case(**{**vars(case), "kl_coeff": coeff, "kl_space": space})


@pytest.fixture(scope="module")
def tuned(tiny_path: Path) -> StableDiffusion:
    made = tiny_model(tiny_path)
    randomize(made)
    return made


@pytest.fixture(scope="module")
def hand(tiny_path: Path) -> ByHand:
    return ByHand(tiny_path, PROMPTS, TinyScorer().scores, noise_source(3))


@pytest.fixture(scope="module")
def bar(tuned: StableDiffusion) -> dict[str, Tensor]:
    """The parameters' values; one dictionary, so that the frozen trajectory is computed once."""
    return leaves(tuned)


@pytest.fixture(scope="module")
def computed(tuned: StableDiffusion) -> Callable[[str, str], tuple[Loss, dict[str, Tensor]]]:
    """The loss and gradient under test, computed once for each method and penalty."""

    @cache
    def compute(method: str, penalty: str) -> tuple[Loss, dict[str, Tensor]]:
        objective, window, case = pick(method, penalty)
        result = ours(tuned, case, objective, window)
        return result, gradients(tuned.tuned.trainable(), result.value)

    return compute


def ours(made: StableDiffusion, case: Case, objective: ObjectiveConfig, window: Window) -> Loss:
    return run(problem(made, objective, TOTAL, eta=case.eta), window)


def run(setting: Problem, window: Window) -> Loss:
    noise, conditioning = noise_source(3), setting.model.encode(PROMPTS)
    planned = plan_around(window, setting.objective, setting.sampler.schedule)
    return loss(setting, prefix(setting, conditioning, noise, planned), planned, conditioning, PROMPTS, noise)


def leaves(made: StableDiffusion) -> dict[str, Tensor]:
    # peft's names without the adapter's: "….lora_A.default.weight"
    return {n.replace(".default", ""): p.detach().clone() for n, p in made.tuned.trainable().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert len(found) == len(expected) > 0
    for (name, got), want in zip(found.items(), expected.values(), strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_equals_an_independent_computation(
    computed: Any, bar: dict[str, Tensor], hand: ByHand, method: str, penalty: str
) -> None:
    result, found = computed(method, penalty)
    theta = {name: tensor.clone().requires_grad_() for name, tensor in bar.items()}
    value = hand.objective(theta, bar, pick(method, penalty)[2])
    expected = dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))

    torch.testing.assert_close(result.value.detach(), value.detach(), rtol=1e-11, atol=1e-12)
    assert_same(found, expected)
    assert (result.penalties["kl"] > 0) == (penalty != "plain")


@pytest.mark.parametrize(
    ("method", "penalty"),
    [*((m, p) for m in METHODS for p in ("plain", "kl")), *((m, "kl-x0") for m in ("draft-3", "draft_lv", "drtune"))],
)
def test_gradient_equals_finite_differences_of_the_frozen_part_function(
    computed: Any, bar: dict[str, Tensor], hand: ByHand, method: str, penalty: str
) -> None:
    found, case = computed(method, penalty)[1], pick(method, penalty)[2]
    for seed in (1, 2):
        along, h = directions(bar, seed), 1e-5
        with torch.no_grad():
            up, down = (
                hand.objective({n: bar[n] + sign * h * along[n] for n in bar}, bar, case).item() for sign in (1, -1)
            )
        slope = (up - down) / (2 * h)
        assert abs(slope) > 1e-3
        assert inner(found, along) == pytest.approx(slope, rel=1e-5)


def directions(bar: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {name: normal(*tensor.shape, seed=1000 * seed + i) * 0.1 for i, (name, tensor) in enumerate(bar.items())}


def inner(found: dict[str, Tensor], along: dict[str, Tensor]) -> float:
    return sum((g * d).sum().item() for g, d in zip(found.values(), along.values(), strict=True))


@pytest.mark.parametrize(
    ("method", "penalty", "agrees"),
    [
        ("draft-all", "plain", True),
        ("draft-all", "kl", False),  # the reference's input moves with theta, the gradient rightly ignores it
        ("draft-1", "plain", False),
        ("draft-1", "kl", False),
        ("draft-3", "plain", False),
        ("alignprop", "plain", False),
        ("draft_lv", "plain", False),
        ("refl", "plain", False),
        ("drtune", "plain", False),
    ],
)
def test_naive_differences_agree_for_the_full_window_without_kl_alone(
    tuned: StableDiffusion, computed: Any, bar: dict[str, Tensor], method: str, penalty: str, agrees: bool
) -> None:
    objective, window, case = pick(method, penalty)
    parameters, found, along = tuned.tuned.trainable(), computed(method, penalty)[1], directions(bar, 1)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    h, values = 1e-5, []
    for sign in (1, -1):
        for name, p in parameters.items():
            p.data = start[name] + sign * h * along[name.replace(".default", "")]
        values.append(ours(tuned, case, objective, window).value.item())
    for name, p in parameters.items():
        p.data = start[name]
    slope = (values[0] - values[1]) / (2 * h)
    if agrees:
        assert inner(found, along) == pytest.approx(slope, rel=1e-5)
    else:
        assert inner(found, along) != pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(
    ("method", "penalty"),
    [("draft-3", "plain"), ("draft-3", "kl"), ("draft-3", "kl-x0"), ("draft_lv", "kl"), ("drtune", "kl-x0")],
)
def test_velocity_prediction(
    tuned: StableDiffusion, bar: dict[str, Tensor], tiny_path: Path, method: str, penalty: str
) -> None:
    objective, window, case = pick(method, penalty)
    setting = problem(tuned, objective, TOTAL, scheduler={**SCHEDULER, "prediction_type": "v_prediction"})
    found = gradients(tuned.tuned.trainable(), run(setting, window).value)
    hand = ByHand(tiny_path, PROMPTS, TinyScorer().scores, noise_source(3), prediction="v_prediction")
    theta = {name: tensor.clone().requires_grad_() for name, tensor in bar.items()}
    expected = torch.autograd.grad(hand.objective(theta, bar, case), list(theta.values()))
    assert_same(found, dict(zip(theta, expected, strict=True)))


def test_negative_prompt(tuned: StableDiffusion, bar: dict[str, Tensor], tiny_path: Path) -> None:
    objective, window, case = pick("draft-3", "kl")
    setting = problem(tuned, objective, TOTAL, negative_prompt="a shark")
    found = gradients(tuned.tuned.trainable(), run(setting, window).value)
    hand = ByHand(tiny_path, PROMPTS, TinyScorer().scores, noise_source(3), negative="a shark")
    theta = {name: tensor.clone().requires_grad_() for name, tensor in bar.items()}
    expected = torch.autograd.grad(hand.objective(theta, bar, case), list(theta.values()))
    assert_same(found, dict(zip(theta, expected, strict=True)))


@pytest.mark.parametrize("method", ["draft-1", "draft-3", "draft_lv", "drtune"])
def test_full_fine_tuning(tiny_path: Path, method: str) -> None:
    objective, window, case = pick(method, "kl")
    made = tiny_model(tiny_path, full=True)
    randomize(made, size=0.2)
    result = ours(made, case, objective, window)
    found = gradients(made.tuned.trainable(), result.value)
    hand = ByHand(tiny_path, PROMPTS, TinyScorer().scores, noise_source(3))
    bar = leaves(made)
    assert set(bar) == {name for name, _ in hand.modules[0].named_parameters()}
    theta = {name: tensor.clone().requires_grad_() for name, tensor in bar.items()}
    value = hand.objective(theta, bar, case)
    expected = torch.autograd.grad(value, list(theta.values()))
    torch.testing.assert_close(result.value.detach(), value.detach(), rtol=1e-11, atol=1e-12)
    for (name, got), want in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_rewards_on_both_sides_of_the_hinge(computed: Any) -> None:
    scores = computed("refl-hinge", "plain")[0].scores.total
    assert (scores < HINGE - 0.1).any() and (scores > HINGE + 0.1).any()
