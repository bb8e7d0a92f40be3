"""The KL term over the trajectory: unbiased, with the gradient of its formula, in every method, and nothing at 0."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.config.objective import DdpoConfig
from draftplus.diffusion.objectives import loss, plan, prefix
from draftplus.diffusion.policy import rollout, step_loss
from draftplus.diffusion.problem import Problem, StepPlan
from draftplus.diffusion.regularisers import PREFIX, WINDOW, path_weights, rest
from draftplus.diffusion.sampler import Rollout
from draftplus.diffusion.schedule import Schedule, make_schedule
from draftplus.diffusion.solvers import ddim_deviation
from draftplus.diffusion.window import Window, last, single, spaced
from draftplus.models.stable_diffusion import StableDiffusion
from tests.diffusion.test_regularisers import GUIDANCE, TOTAL, by_hand, run, trajectory
from tests.tiny import PROMPTS, SCHEDULER, gradients, noise_source, problem, randomize

ON, OFF = 5.0, 0.5  # the coefficients before the window and in it


def objective(k: int | str = 1, method: str = "draft", **more: Any) -> ObjectiveConfig:
    given = {"kl_coeff": OFF, "kl_steps": "trajectory", "kl_prefix_coeff": ON, **more}
    return ObjectiveConfig(method, k, **given)


def schedule(total: int = TOTAL) -> Schedule:
    return make_schedule(SCHEDULER, total)[0]


def every_plan(setting: ObjectiveConfig, draws: int) -> list[StepPlan]:
    """All that can be drawn, once each; every one is as likely as any other."""
    made = [plan(setting, schedule(), 0, step) for step in range(40 * TOTAL**draws)]
    distinct = {tuple(sorted(one.looks[PREFIX])): one for one in made}
    return list(distinct.values())


@pytest.mark.parametrize(("k", "draws"), [(1, 1), (1, 2), (1, 4), (1, 9), (3, 1), (3, 2)])
def test_what_is_drawn_is_stratified(k: int, draws: int) -> None:
    """As many steps as asked for, or all there are, one from each stretch."""
    before = TOTAL - k
    drawn = every_plan(objective(k, kl_draws=draws), min(draws, 2))
    taken = min(draws, before)
    bounds = [before * part // taken for part in range(taken + 1)]
    stretches = [range(low, high) for low, high in pairwise(bounds)]
    assert {tuple(sorted(one.looks[PREFIX])) for one in drawn} == set(product(*stretches))
    assert all(one.looks[WINDOW] == dict.fromkeys(range(before, TOTAL), 1.0) for one in drawn)


@pytest.mark.parametrize("weights", ["uniform", "noise_level", "path"])
@pytest.mark.parametrize(("k", "draws"), [(1, 1), (1, 3), (2, 2)])
def test_the_mean_over_all_draws_is_the_whole_sum(model: StableDiffusion, weights: str, k: int, draws: int) -> None:
    """In value and in gradient, the strata unequal."""
    given = objective(k, kl_draws=draws, kl_weights=weights)
    setting = problem(model, given, TOTAL, GUIDANCE)
    xs, before = trajectory(setting), range(TOTAL - k)
    scale = path_weights(given, schedule(), before)
    whole = torch.stack([w * by_hand(model, xs, [i]) for w, i in zip(scale, before, strict=True)]).mean()
    plans = every_plan(given, draws)
    assert len(plans) > 1
    values, slopes = [], []
    for planned in plans:
        terms = [f * by_hand(model, xs, [i]) for i, f in planned.looks[PREFIX].items()]
        values.append(torch.stack(terms).mean())
        slopes.append(gradients(model.tuned.trainable(), values[-1]))
    torch.testing.assert_close(torch.stack(values).mean(), whole, rtol=1e-12, atol=0)
    for name, grad in gradients(model.tuned.trainable(), whole).items():
        mean = torch.stack([one[name] for one in slopes]).mean(0)
        torch.testing.assert_close(mean, grad, rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("space", ["noise", "x0"])
@pytest.mark.parametrize("k", [1, 3])
def test_value_and_gradient_are_those_of_the_formula(model: StableDiffusion, k: int, space: str) -> None:
    """Against the network called alone, with guidance; the latents that the term looks at carry no gradient."""
    given = objective(k, kl_draws=2, kl_weights="path", kl_space=space)
    setting = problem(model, given, TOTAL, GUIDANCE)
    found, planned = run(setting), plan(given, schedule(), 0, 0)
    alone = run(replace(setting, objective=replace(given, kl_steps="window")))
    xs, steps = trajectory(setting), schedule().steps

    def distance(i: int) -> Tensor:
        scale = (steps[i].sigma / steps[i].alpha) ** 2 if space == "x0" else 1.0
        return scale * by_hand(model, xs, [i])

    term = torch.stack([factor * distance(i) for i, factor in planned.looks[PREFIX].items()]).mean()
    torch.testing.assert_close(found.value, alone.value + ON * term, rtol=1e-10, atol=0)
    before, after = (gradients(model.tuned.trainable(), one.value) for one in (alone, found))
    for name, grad in gradients(model.tuned.trainable(), term).items():
        torch.testing.assert_close(after[name], before[name] + ON * grad, rtol=1e-8, atol=1e-12, msg=name)
    assert found.penalties["kl/window"] == alone.penalties["kl"]
    torch.testing.assert_close(found.penalties["kl/prefix"], term.detach(), rtol=1e-10, atol=0)
    assert float(found.penalties["kl"]) == pytest.approx(float(alone.penalties["kl"] + term), rel=1e-9)
    for i in planned.looks[PREFIX]:
        torch.testing.assert_close(found.penalties[f"kl/step/{i}"], distance(i).detach(), rtol=1e-10, atol=0)


def test_the_gradient_is_that_of_finite_differences(model: StableDiffusion) -> None:
    """With the latents held where they are, as the term's definition says."""
    given = objective(1, kl_draws=4, kl_coeff=0.0, kl_prefix_coeff=1.0)
    setting = problem(model, given, TOTAL, GUIDANCE)
    planned = plan(given, schedule(), 0, 0)
    plain = run(replace(setting, objective=replace(given, kl_prefix_coeff=0.0)))
    at = gradients(model.tuned.trainable(), plain.value)
    slope = {name: grad - at[name] for name, grad in gradients(model.tuned.trainable(), run(setting).value).items()}
    xs, parameters = trajectory(setting), model.tuned.trainable()
    generator = torch.Generator().manual_seed(3)
    along = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()}

    @torch.no_grad()
    def moved(by: float) -> float:
        for name, parameter in parameters.items():
            parameter += by * along[name]
        value = torch.stack([f * by_hand(model, xs, [i]) for i, f in planned.looks[PREFIX].items()]).mean()
        for name, parameter in parameters.items():
            parameter -= by * along[name]
        return float(value)

    h = 1e-5
    expected = (moved(h) - moved(-h)) / (2 * h)
    assert sum(float((slope[name] * along[name]).sum()) for name in slope) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["draft", "draft_lv", "refl", "alignprop", "drtune"])
def test_it_is_exactly_zero_at_the_start(fresh: StableDiffusion, method: str) -> None:
    """Value and gradient, in every method: the adapters are the frozen model."""
    given = objective(1, method, kl_draws=3, kl_coeff=0.0)
    setting = problem(fresh, given, TOTAL, GUIDANCE)
    found = run(setting)
    plain = run(replace(setting, objective=replace(given, kl_steps="window")))
    assert found.penalties["kl/prefix"] == 0
    assert torch.equal(found.value, plain.value)
    ours, theirs = (gradients(fresh.tuned.trainable(), one.value) for one in (found, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def fresh(tiny_path: Any) -> StableDiffusion:
    from tests.tiny import tiny_model

    return tiny_model(tiny_path)


def test_a_coefficient_of_zero_is_the_window_alone(model: StableDiffusion) -> None:
    given = objective(1, kl_prefix_coeff=0.0)
    setting = problem(model, given, TOTAL, GUIDANCE)
    found, alone = run(setting), run(replace(setting, objective=replace(given, kl_steps="window")))
    assert torch.equal(found.value, alone.value) and found.penalties.keys() == {"kl"} == alone.penalties.keys()
    assert plan(given, schedule(), 0, 0).keep == frozenset()


def test_null_is_the_coefficient_of_the_window(model: StableDiffusion) -> None:
    given = objective(1, kl_prefix_coeff=None)
    found = run(problem(model, given, TOTAL, GUIDANCE))
    same = run(problem(model, replace(given, kl_prefix_coeff=OFF), TOTAL, GUIDANCE))
    assert torch.equal(found.value, same.value) and found.penalties["kl/prefix"] > 0


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (last(1, 5), [0, 1, 2, 3]),
        (last(5, 5), []),
        (single(2), [0, 1]),  # ReFL ends there
        (spaced(2, 6, 0, 0), [1, 2, 4, 5]),  # DRTune's steps between those with gradient
        (spaced(2, 6, 0, 2), [1, 2]),
    ],
)
def test_the_rest_are_the_steps_that_are_visited_without_gradient(window: Window, expected: list[int]) -> None:
    assert rest(window, 6 if window.detach_inputs else 5) == expected


def test_a_window_of_all_steps_leaves_nothing(model: StableDiffusion) -> None:
    given = objective("all")
    setting = problem(model, given, TOTAL, GUIDANCE)
    alone = run(replace(setting, objective=replace(given, kl_steps="window")))
    found = run(setting)
    assert torch.equal(found.value, alone.value) and found.penalties["kl/prefix"] == 0


@pytest.mark.parametrize("space", ["noise", "x0"])
def test_path_weights_are_the_divergence_of_two_gaussians(space: str) -> None:
    """Of DDIM's step at eta = 1: both means, written out, and its variance."""
    made = schedule(8)
    steps = [i for i, step in enumerate(made.steps) if ddim_deviation(step, 1.0) > 0]
    x, eps, other = 0.3, 0.7, -0.4
    told = []
    for i in steps:
        t = made.steps[i]
        deviation = ddim_deviation(t, 1.0)

        def mean(e: float, t: Any = t, deviation: float = deviation) -> float:
            return t.next_alpha * (x - t.sigma * e) / t.alpha + math.sqrt(t.next_sigma**2 - deviation**2) * e

        divergence = (mean(eps) - mean(other)) ** 2 / (2 * deviation**2)
        gap = (eps - other) ** 2 * ((t.sigma / t.alpha) ** 2 if space == "x0" else 1)
        told.append(divergence / gap)
    expected = [one * len(told) / sum(told) for one in told]
    found = path_weights(objective(kl_weights="path", kl_space=space), made, steps)
    assert found == pytest.approx(expected, rel=1e-9)
    assert max(found) / min(found) > 1.5


def test_path_weights_of_a_flow() -> None:
    """x_t = (1 - s) x_0 + s eps: by the growth of the signal-to-noise ratio, in velocities."""
    file = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    made = make_schedule(file, 6)[0]
    found = path_weights(objective(kl_weights="path", kl_space="velocity"), made, range(1, 5))

    def ratio(s: float) -> float:
        return (1 - s) ** 2 / s**2

    pairs = [(made.steps[i].sigma, made.steps[i].next_sigma) for i in range(1, 5)]
    told = [(ratio(r) - ratio(s)) * s**2 for s, r in pairs]  # at one x_t a velocity off by d is an image off by s d
    assert found == pytest.approx([one * 4 / sum(told) for one in told], rel=1e-9)
    first = path_weights(objective(kl_weights="path", kl_space="velocity"), made, range(5))
    assert all(math.isfinite(one) and one > 0 for one in first)  # step 0 is pure noise, of no signal
    noise = path_weights(objective(kl_weights="path", kl_space="noise"), made, range(5))
    assert noise[0] == 0 and all(math.isfinite(one) for one in noise)


def test_noise_level_weights_have_mean_one() -> None:
    made = schedule()
    found = path_weights(objective(kl_weights="noise_level"), made, range(4))
    assert sum(found) == pytest.approx(4) and sorted(found, reverse=True) == found
    assert found[0] / found[3] == pytest.approx(made.steps[0].sigma / made.steps[3].sigma)


def test_ddpo_looks_at_the_step_without_variance_too(model: StableDiffusion) -> None:
    given = replace(objective("all", "ddpo", kl_coeff=0.0), ddpo=DdpoConfig(eta=0.8))
    setting = problem(model, given, TOTAL, GUIDANCE, eta=0.8, scheduler={**SCHEDULER, "set_alpha_to_one": True})
    conditioning, advantages = model.encode(PROMPTS), torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    made = rollout(setting, conditioning, noise_source(3))
    randomize(model, seed=8, size=0.02)

    def whole(one: Problem) -> Tensor:
        planned = plan(one.objective, one.sampler.schedule, 0, 0)
        at = sorted({*planned.window.steps, *planned.keep})
        parts = [step_loss(one, planned, made, index, conditioning, advantages) for index in at]
        return torch.stack([part.value for part in parts]).sum() / len(planned.window.steps)

    plain = whole(replace(setting, objective=replace(given, kl_steps="window")))
    expected = by_hand(model, list(made.latents.unbind(1)), [TOTAL - 1])
    torch.testing.assert_close(whole(setting), plain + ON * expected, rtol=1e-9, atol=1e-12)


def test_the_latents_before_the_window_need_not_be_drawn_in_one_piece(model: StableDiffusion) -> None:
    """Where the tail has steps between its window's, as DRTune's, these are kept on the way through it."""
    given = objective(2, "drtune", kl_draws=9)
    setting = problem(model, given, TOTAL, GUIDANCE)
    planned = plan(given, schedule(), 0, 0)
    noise, conditioning = noise_source(3), model.encode(PROMPTS)
    start = Rollout.concatenate([prefix(setting, conditioning, noise, planned)])
    part = loss(setting, start, planned, conditioning, PROMPTS, noise)
    assert set(part.kept) == planned.keep == set(rest(planned.window, TOTAL))
