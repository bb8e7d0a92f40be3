"""Regularisers look at steps of their own choice, in every method; a new one is an entry of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.config.objective import DdpoConfig
from draftplus.diffusion import regularisers
from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.objectives import Loss, kept_loss, loss, plan, prefix
from draftplus.diffusion.policy import rollout, step_loss
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.regularisers import REGULARISERS, Regulariser, kl
from draftplus.diffusion.sampler import Rollout, Visit, sample
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.training.dry_run import passes
from tests.support.runs import rows, train_here
from tests.tiny import PROMPTS, SCHEDULER, gradients, noise_source, normal, problem, randomize

TOTAL, GUIDANCE, WEIGHT = 5, 3.0, 0.7
METHODS = ["draft", "draft_lv", "refl", "alignprop", "drtune"]


def early(steps: Sequence[int] = (0, 1), weight: float = WEIGHT) -> Regulariser:
    """The KL term's penalty, at given steps."""
    return Regulariser(lambda objective: weight, lambda objective, window, *_: dict.fromkeys(steps, 1.0), kl)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Any:
    def add(one: Regulariser) -> None:
        monkeypatch.setitem(REGULARISERS, "early", one)

    return add


def run(setting: Problem) -> Loss:
    planned = plan(setting.objective, setting.sampler.schedule, 0, 0)
    noise, conditioning = noise_source(3), setting.model.encode(PROMPTS)
    start = Rollout.concatenate([prefix(setting, conditioning, noise, planned)]).rows(slice(0, 3))
    part = loss(setting, start, planned, conditioning, PROMPTS, noise)
    parts = [part, *(kept_loss(setting, planned, part, step, conditioning) for step in part.kept)]
    penalties = {name: torch.stack([one.penalties[name] for one in parts]).sum() for name in part.penalties}
    return replace(part, value=torch.stack([one.value for one in parts]).sum(), penalties=penalties)


def by_hand(model: StableDiffusion, xs: Sequence[Tensor], steps: Sequence[int], total: int = TOTAL) -> Tensor:
    """The mean over steps of the mean squared difference of both guided predictions, with the network called alone."""
    terms = []
    for i in steps:
        t = torch.tensor((total - 1 - i) * (1000 // total) + 1)  # leading spacing with an offset of 1

        def guided(x: Tensor, t: Tensor = t) -> Tensor:
            u, c = (model.predict(x, t, model.encode(text)) for text in ([""] * len(x), PROMPTS))
            return u + GUIDANCE * (c - u)

        ours = guided(xs[i])
        with torch.no_grad(), model.tuned.reference():
            theirs = guided(xs[i])
        terms.append((ours - theirs).square().mean())
    return torch.stack(terms).mean()


@torch.no_grad()
def trajectory(setting: Problem) -> list[Tensor]:
    xs: list[Tensor] = []

    def remembering(x: Tensor, index: int) -> Any:
        xs.append(x)
        return denoise(x, index)

    denoise = setting.sampler.denoiser(setting.model.encode(PROMPTS))
    sample(remembering, Rollout(noise_source(3)("x_T", 0)), setting.sampler.schedule, setting.sampler.solver)
    return xs


@pytest.mark.parametrize("method", METHODS)
def test_steps_without_gradient_are_penalised_too(model: StableDiffusion, added: Any, method: str) -> None:
    """The reward's gradient ends at the window; the penalty's reaches the weights at the steps before it."""
    objective = ObjectiveConfig(method, 2 if method in ("draft", "drtune") else 1)
    objective.alignprop.max_steps = 3
    plain = run(problem(model, objective, TOTAL, GUIDANCE))
    before = gradients(model.tuned.trainable(), plain.value)
    added(early())
    setting = problem(model, objective, TOTAL, GUIDANCE)
    found = run(setting)
    assert found.penalties.keys() == {"kl", "early"} and found.penalties["kl"] == 0
    assert torch.equal(found.images, plain.images)

    expected = by_hand(model, trajectory(setting), (0, 1))
    torch.testing.assert_close(found.penalties["early"], expected.detach(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.value, plain.value + WEIGHT * expected, rtol=1e-10, atol=0)
    penalty = gradients(model.tuned.trainable(), expected)
    for name, grad in gradients(model.tuned.trainable(), found.value).items():
        assert penalty[name].abs().max() > 0
        torch.testing.assert_close(grad, before[name] + WEIGHT * penalty[name], rtol=1e-7, atol=1e-11, msg=name)


def test_the_kl_term_over_the_window_is_evaluated_once(model: StableDiffusion, added: Any) -> None:
    """Where a regulariser looks at the window's steps, their predictions serve; elsewhere the network runs again."""
    for steps, more in (((3, 4), 0), ((0,), 1), ((0, 2, 4), 2)):
        added(early(steps))
        setting = problem(model, ObjectiveConfig("draft", 2), TOTAL, GUIDANCE)
        calls = _count_predictions(model)
        run(setting)
        # 5 steps of sampling, the frozen model at each that is looked at, the trained one where it had no gradient
        assert len(calls) == TOTAL + len(steps) + more
        plain, graded, frozen = passes(setting, 0)
        assert plain + graded + frozen == len(calls)
        assert sum(calls) == graded == 2 + more


def _count_predictions(model: StableDiffusion) -> list[bool]:
    """Whether each prediction carries gradient."""
    calls: list[bool] = []
    predict = type(model).predict

    def counting(*args: Any) -> Tensor:
        raw = predict(model, *args)
        calls.append(raw.requires_grad)
        return raw

    model.predict = counting  # type: ignore[method-assign]
    return calls


def test_each_kept_step_has_a_graph_of_its_own(model: StableDiffusion, added: Any) -> None:
    """So that what the backward pass needs does not grow with their number."""
    added(early((0, 1, 2)))
    setting = problem(model, ObjectiveConfig("draft", 2), TOTAL, GUIDANCE)
    planned = plan(setting.objective, setting.sampler.schedule, 0, 0)
    noise, conditioning = noise_source(3), model.encode(PROMPTS)
    start = prefix(setting, conditioning, noise, planned)
    calls = _count_predictions(model)
    part = loss(setting, start, planned, conditioning, PROMPTS, noise)
    assert list(part.kept) == [0, 1, 2] and calls == [True, True]  # the window's two steps, and no other pass
    for step in part.kept:
        calls.clear()
        kept_loss(setting, planned, part, step, conditioning)
        assert calls == [True, False]  # the trained and the frozen model


def test_without_weight_nothing_is_kept_or_computed(model: StableDiffusion, added: Any) -> None:
    added(early(weight=0.0))
    setting = problem(model, ObjectiveConfig("draft", 2), TOTAL, GUIDANCE)
    assert plan(setting.objective, setting.sampler.schedule, 0, 0).keep == frozenset()
    calls = _count_predictions(model)
    assert run(setting).penalties["early"] == 0 and len(calls) == TOTAL


def ddpo(model: StableDiffusion, **more: Any) -> Problem:
    objective = ObjectiveConfig("ddpo", "all", ddpo=DdpoConfig(eta=0.8))
    return problem(model, objective, TOTAL, GUIDANCE, eta=0.8, **more)


@pytest.mark.parametrize("steps", [(0, 1), (1, 4), (4,)], ids=str)
def test_ddpo_has_the_same_ones(model: StableDiffusion, added: Any, steps: tuple[int, ...]) -> None:
    """Also at a step without variance, which has no policy gradient: here the last, 4."""
    setting = ddpo(model, scheduler={**SCHEDULER, "set_alpha_to_one": True})
    conditioning, advantages = model.encode(PROMPTS), torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    made = rollout(setting, conditioning, noise_source(3))
    randomize(model, seed=8, size=0.02)  # ratios that are not 1

    def whole() -> tuple[Tensor, Tensor, list[int]]:
        planned = plan(setting.objective, setting.sampler.schedule, 0, 0)
        at = sorted({*planned.window.steps, *planned.keep})
        parts = [step_loss(setting, planned, made, index, conditioning, advantages) for index in at]
        count = len(planned.window.steps)
        told = sum((part.penalties.get("early", torch.zeros(())) for part in parts), torch.zeros(()))
        return torch.stack([part.value for part in parts]).sum() / count, told / count, at

    plain, nothing, at = whole()
    assert at == [0, 1, 2, 3] and nothing == 0
    added(early(steps))
    value, told, at = whole()
    assert at == sorted({0, 1, 2, 3, *steps})
    expected = by_hand(model, list(made.latents.unbind(1)), steps)
    torch.testing.assert_close(told.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(value, plain + WEIGHT * expected, rtol=1e-9, atol=1e-12)


def test_what_is_kept_survives_cutting_and_joining() -> None:
    parts = [Rollout(normal(n, 1, 2, 2), kept={3: normal(n, 1, 2, 2, seed=n)}) for n in (2, 1)]
    joined = Rollout.concatenate(parts)
    assert torch.equal(joined.kept[3], torch.cat([part.kept[3] for part in parts]))
    assert torch.equal(joined.rows(slice(1, 3)).kept[3], joined.kept[3][1:3])


def test_a_penalty_of_ones_own_is_trained_on_and_logged(settings: list[str], added: Any) -> None:
    """A throw-away example: how far apart the two models' clean images are, at a step that is drawn each time."""

    def apart(objective: ObjectiveConfig, trained: Denoise, frozen: Denoise, visit: Visit) -> Tensor:
        step, latents, now = visit
        ours = now or trained(latents, step)
        return (ours.x0 - frozen(latents, step).x0).abs().mean()

    added(
        Regulariser(lambda objective: 0.1, lambda o, window, schedule, seed, step: {step % len(schedule): 1.0}, apart)
    )
    run = train_here(settings, "train.micro_batch_size=2", "objective.grad_steps=1")
    told = rows(run / "metrics.jsonl")
    for row in told:
        assert row["loss"] == pytest.approx(-row["reward"] + 0.1 * row["early"], rel=1e-6)
    assert told[0]["early"] == 0 and all(row["early"] > 0 for row in told[1:])  # at first the models are equal


def test_the_table_is_what_is_used() -> None:
    assert list(regularisers.REGULARISERS) == ["kl/window", "kl/prefix"]
    assert regularisers.active(ObjectiveConfig()) == {}
    assert list(regularisers.active(ObjectiveConfig(kl_coeff=1.0))) == ["kl/window"]
