"""Where gradient flows and where it does not: windows, checkpointing, the prefix, LoRA at its start, other solvers."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.config import LoraConfig, ObjectiveConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.objectives import Loss, loss, plan, plan_around, prefix
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.sampler import NO_GRADIENT, Rollout
from draftplus.diffusion.schedule import denoised
from draftplus.diffusion.window import Window, last
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.types import Conditioning
from tests.tiny import (
    PROMPTS,
    SHAPE,
    TinyScorer,
    gradients,
    noise_source,
    normal,
    problem,
    randomize,
    tiny_model,
)

EACH = ["draft", "draft_lv", "refl", "alignprop", "drtune"]


def objective(method: str, grad_steps: Any = None, kl_coeff: float = 1.0) -> ObjectiveConfig:
    k = grad_steps or (2 if method in ("draft", "drtune") else 1)
    made = ObjectiveConfig(method, k, kl_coeff=kl_coeff)
    made.alignprop.min_steps, made.alignprop.max_steps = 2, 3
    made.drtune.early_stop = 1
    return made


def run(setting: Problem, window: Window | None = None) -> Loss:
    schedule, noise, conditioning = setting.sampler.schedule, noise_source(3), setting.model.encode(PROMPTS)
    if window is None:
        planned = plan(setting.objective, schedule, seed=0, step=0)
    else:
        planned = plan_around(window, setting.objective, schedule)
    return loss(setting, prefix(setting, conditioning, noise, planned), planned, conditioning, PROMPTS, noise)


@pytest.mark.parametrize("method", EACH)
def test_every_trained_tensor_gets_gradient(model: StableDiffusion, method: str) -> None:
    for name, grad in gradients(model.tuned.trainable(), run(problem(model, objective(method))).value).items():
        assert grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("method", EACH)
def test_at_the_start_gradient_reaches_b_and_not_a(fresh: StableDiffusion, method: str) -> None:
    found = gradients(fresh.tuned.trainable(), run(problem(fresh, objective(method))).value)
    a = {name: grad for name, grad in found.items() if "lora_A" in name}
    b = {name: grad for name, grad in found.items() if "lora_B" in name}
    assert len(a) == len(b) == len(found) / 2 > 0
    assert all((grad == 0).all() for grad in a.values())
    assert all(grad.abs().max() > 0 for grad in b.values())


def test_only_trained_tensors_get_gradient(model: StableDiffusion) -> None:
    run(problem(model, objective("draft"))).value.backward()
    trained = {id(parameter) for parameter in model.tuned.trainable().values()}
    for part in (model.unet, model.vae, model.text_encoder):
        for name, parameter in part.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_the_full_window_is_backpropagation_through_everything(model: StableDiffusion, solver: str) -> None:
    setting = problem(model, objective("draft", "all", kl_coeff=0.0), solver=solver)
    found, schedule = gradients(model.tuned.trainable(), run(setting).value), setting.sampler.schedule

    # the same trajectory, nothing detached and no window: every step is recorded
    conditioning, x = model.encode(PROMPTS), noise_source(3)("x_T", 0)
    raw, previous = classifier_free(model.predict, conditioning, model.encode([""]), 3.0), None
    for i, step in enumerate(schedule.steps):
        now = denoised(raw(x, schedule.timestep(i, "cpu")), x, step, "epsilon")
        x, previous = setting.sampler.solver(schedule, i, x, now, previous, None), now.x0
    whole = -TinyScorer().scores(model.decode(x), PROMPTS).mean()
    for name, grad in gradients(model.tuned.trainable(), whole).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", EACH)
def test_checkpointing_changes_no_gradient(tiny_path: Path, method: str) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        made = tiny_model(tiny_path, gradient_checkpointing=checkpointing)
        randomize(made)
        value = run(problem(made, objective(method))).value
        # count what runs again in the backward pass, or the comparison would compare nothing
        count = _count_calls([made.unet.up_blocks[0].resnets[0], made.vae.decoder.mid_block.resnets[0]])
        found.append(gradients(made.tuned.trainable(), value))
        calls.append(count())
    assert calls[0] == [0, 0] and min(calls[1]) >= 1
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-11, atol=1e-14, msg=name)


def _count_calls(modules: list[Any]) -> Callable[[], list[int]]:
    counts = [0] * len(modules)

    def hook(i: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[i] += 1

        return count

    for i, module in enumerate(modules):
        module.register_forward_pre_hook(hook(i))
    return lambda: counts


def part_of(noise: Any, rows: slice) -> Any:
    return lambda stream, draw: noise(stream, draw)[rows]


@pytest.mark.parametrize(
    ("method", "folded"), [*((method, True) for method in EACH), ("draft", False), ("drtune", False)]
)
def test_one_prefix_batch_equals_many(model: StableDiffusion, method: str, folded: bool) -> None:
    setting = problem(model, objective(method), eta=0.5)
    planned, noise = plan(setting.objective, setting.sampler.schedule, seed=0, step=0), noise_source(3)
    conditioning = model.encode(PROMPTS)
    whole = prefix(setting, conditioning, noise, planned)
    with model.tuned.folded() if folded else torch.no_grad():
        parts = [
            prefix(setting, conditioning.rows(rows), part_of(noise, rows), planned)
            for rows in (slice(0, 2), slice(2, 3))
        ]
    joined = Rollout.concatenate(parts)
    torch.testing.assert_close(joined.latents, whole.latents, rtol=1e-10, atol=1e-12)
    assert (joined.previous is None) == (whole.previous is None) == (planned.window.first == 0)

    expected = gradients(model.tuned.trainable(), loss(setting, whole, planned, conditioning, PROMPTS, noise).value)
    rows = slice(1, 3)
    share = loss(setting, joined.rows(rows), planned, conditioning.rows(rows), PROMPTS[rows], part_of(noise, rows))
    rest = slice(0, 1)
    other = loss(setting, joined.rows(rest), planned, conditioning.rows(rest), PROMPTS[rest], part_of(noise, rest))
    found = gradients(model.tuned.trainable(), share.value * 2 / 3 + other.value / 3)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("method", EACH)
def test_the_prefix_carries_no_graph(model: StableDiffusion, method: str) -> None:
    setting = problem(model, objective(method))
    graphs = _record_graphs(model)
    window = Window((3,), detach_inputs=method == "drtune", x0_at=3 if method == "refl" else None)
    planned = plan_around(window, setting.objective, setting.sampler.schedule)
    start = prefix(setting, model.encode(PROMPTS), noise_source(3), planned)
    assert graphs == [False] * 3
    assert not start.latents.requires_grad and start.previous is not None and not start.previous.requires_grad
    assert start.visits == []


def test_gradient_runs_in_the_window_alone(model: StableDiffusion) -> None:
    setting = problem(model, objective("drtune"))
    graphs = _record_graphs(model)
    start = Rollout(normal(3, *SHAPE))
    rollout = setting.sampler.sample(model.encode(PROMPTS), start, Window((1, 3), detach_inputs=True))
    assert graphs == [False, True, False, True, False]
    assert [visit.step for visit in rollout.visits] == [1, 3]
    assert rollout.latents.requires_grad


def test_no_gradient_under_no_grad_whatever_the_window(model: StableDiffusion) -> None:
    setting = problem(model, objective("draft"))
    for window in (NO_GRADIENT, last(2, 5)):
        with torch.no_grad():
            rollout = setting.sampler.sample(model.encode(PROMPTS), Rollout(normal(3, *SHAPE)), window)
        assert not rollout.latents.requires_grad and rollout.visits == []


def _record_graphs(model: StableDiffusion) -> list[bool]:
    # whether each prediction carries gradient, in order
    seen: list[bool] = []
    predict = model.predict

    def recording(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        raw = predict(latents, timestep, conditioning)
        seen.append(raw.requires_grad)
        return raw

    model.predict = recording  # type: ignore[method-assign]
    return seen


def test_detached_inputs_still_pass_gradient_through_the_solver(model: StableDiffusion) -> None:
    # a step in the middle reaches the image through later steps' linear terms alone, and must reach it
    setting = problem(model, objective("drtune", kl_coeff=0.0))
    found = gradients(model.tuned.trainable(), run(setting, Window((1,), detach_inputs=True)).value)
    assert all(grad.abs().max() > 0 for grad in found.values())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_multistep_gradient_by_hand(model: StableDiffusion, k: int) -> None:
    """DPM-Solver++(2M) from its algorithm; the x0 remembered from outside the window is a constant."""
    total, guidance = 4, 3.0
    setting = problem(model, objective("draft", k, kl_coeff=0.0), steps=total, solver="dpmpp_2m")
    found = gradients(model.tuned.trainable(), run(setting).value)

    betas = torch.linspace(sqrt(0.00085), sqrt(0.012), 1000, dtype=torch.float64) ** 2
    bars = torch.cumprod(1 - betas, 0)
    times = [(total - i) * (1000 // (total + 1)) + 1 for i in range(total)]
    alphas = [sqrt(bars[t]) for t in times] + [1.0]
    sigmas = [sqrt(1 - bars[t]) for t in times] + [0.0]
    lambdas = [log(a / s) for a, s in zip(alphas[:-1], sigmas[:-1], strict=True)]

    given, without = model.encode(PROMPTS), model.encode([""] * 3)
    x, before = noise_source(3)("x_T", 0), None
    for i, t in enumerate(times):
        with torch.set_grad_enabled(i >= total - k):
            u, c = (model.predict(x, torch.tensor(t), text) for text in (without, given))
            x0 = (x - sigmas[i] * (u + guidance * (c - u))) / alphas[i]
            if i == total - 1:  # lambda is infinite at the image: the first-order step is x0 itself
                x = x0
                break
            h, d = lambdas[i + 1] - lambdas[i], x0
            if before is not None:
                r = (lambdas[i] - lambdas[i - 1]) / h
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
            x, before = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * (exp(-h) - 1) * d, x0
    expected = gradients(model.tuned.trainable(), -TinyScorer().scores(model.decode(x), PROMPTS).mean())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kl_space", ["noise", "x0", "velocity"])
def test_flow_gradient_by_hand(model: StableDiffusion, kl_space: str) -> None:
    """Euler on the velocity u = eps - x0; KL between velocities, as distances of eps, of x0 or of themselves."""
    total, k, guidance, beta = 4, 2, 3.0, 2.0
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    chosen = objective("draft", k, kl_coeff=beta)
    chosen.kl_space = kl_space
    found = gradients(model.tuned.trainable(), run(problem(model, chosen, steps=total, scheduler=scheduler)).value)

    sigmas = [*torch.linspace(1.0, 0.001, total, dtype=torch.float64).float().tolist(), 0.0]  # in stock's float32
    given, without = model.encode(PROMPTS), model.encode([""] * 3)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        t = torch.tensor(1000 * sigma, dtype=torch.float32)
        u, c = (model.predict(x, t, text) for text in (without, given))
        return u + guidance * (c - u)

    x, terms = noise_source(3)("x_T", 0), []
    for i in range(total):
        with torch.set_grad_enabled(i >= total - k):
            v = velocity(x, sigmas[i])
            if i >= total - k:
                with torch.no_grad(), model.tuned.reference():
                    frozen = velocity(x, sigmas[i])
                terms.append((v - frozen) * {"noise": 1 - sigmas[i], "x0": sigmas[i], "velocity": 1}[kl_space])
            x = x + (sigmas[i + 1] - sigmas[i]) * v
    penalty = torch.stack(terms).square().mean()
    value = -TinyScorer().scores(model.decode(x), PROMPTS).mean() + beta * penalty
    for name, grad in gradients(model.tuned.trainable(), value).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_kl_reaches_theta_through_the_trained_prediction_alone(model: StableDiffusion) -> None:
    """The reference is a constant: no call of it carries a graph, and moving its input moves no gradient."""
    graphs = _record_graphs(model)
    setting = problem(model, objective("draft", 3))
    run(setting)
    # two steps of prefix, three trained, three of the reference
    assert graphs == [False] * 2 + [True] * 3 + [False] * 3


def test_without_kl_the_reference_is_not_evaluated(model: StableDiffusion) -> None:
    graphs = _record_graphs(model)
    run(problem(model, objective("draft", 3, kl_coeff=0.0)))
    assert graphs == [False] * 2 + [True] * 3


def test_one_guided_call_per_step(model: StableDiffusion) -> None:
    graphs = _record_graphs(model)
    run(problem(model, objective("draft_lv")))
    # prefix, trained step, two copies, and the reference at each of those three
    assert graphs == [False] * 4 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("targets", ["attention", "linear", "convolution", ["to_q", "conv1"]])
def test_every_choice_of_targets_trains(tiny_path: Path, targets: Any) -> None:
    made = tiny_model(tiny_path, lora=LoraConfig(rank=3, alpha=3.0, targets=targets))
    randomize(made)
    found = gradients(made.tuned.trainable(), run(problem(made, objective("draft"))).value)
    assert found and all(grad.abs().max() > 0 for grad in found.values())
    if targets == ["to_q", "conv1"]:
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in found} == {"to_q", "conv1"}


def test_optimizer_steps_move_the_trained_tensors_alone(fresh: StableDiffusion) -> None:
    frozen = {n: p.detach().clone() for n, p in fresh.unet.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in fresh.tuned.trainable().items()}
    optimizer = torch.optim.AdamW(fresh.tuned.trainable().values(), lr=1e-2)
    setting = problem(fresh, objective("draft"))
    for _ in range(2):
        optimizer.zero_grad()
        run(setting).value.backward()
        optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in fresh.tuned.trainable().items())
    assert all(torch.equal(p, frozen[n]) for n, p in fresh.unet.named_parameters() if n in frozen)
