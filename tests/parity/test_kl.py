"""The KL term against its formula, recomputed with stock pipelines that know nothing of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from draftplus.config import LoraConfig, ObjectiveConfig
from draftplus.diffusion.objectives import Loss, loss, plan, prefix
from draftplus.diffusion.problem import Problem
from draftplus.models.stable_diffusion import StableDiffusion
from tests.tiny import PROMPTS, SCHEDULER, noise_source, problem, stock_pipeline, tiny_model

pytestmark = pytest.mark.slow

STEPS, GUIDANCE = 5, 4.0
ATTENTION = LoraConfig(rank=2, alpha=4.0)


def run(setting: Problem, folded: bool = False) -> Loss:
    planned = plan(setting.objective, setting.sampler.schedule, seed=0, step=0)
    noise, conditioning = noise_source(3), setting.model.encode(PROMPTS)
    if folded:
        with setting.model.tuned.folded():
            start = prefix(setting, conditioning, noise, planned)
    else:
        start = prefix(setting, conditioning, noise, planned)
    return loss(setting, start, planned, conditioning, PROMPTS, noise)


def objective(k: int | str, space: str = "noise", method: str = "draft") -> ObjectiveConfig:
    return ObjectiveConfig(method, k, kl_coeff=0.5, kl_space=space)


def train(made: StableDiffusion, setting: Problem, updates: int = 3) -> None:
    optimizer = torch.optim.AdamW(made.tuned.trainable().values(), lr=2e-2)
    for _ in range(updates):
        optimizer.zero_grad()
        run(setting).value.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "method", "space"),
    [
        *((torch.float32, method, "noise") for method in ("draft", "draft_lv", "refl", "alignprop", "drtune")),
        (torch.float32, "draft", "x0"),
        (torch.float64, "draft", "noise"),
        (torch.bfloat16, "draft", "noise"),
        (torch.bfloat16, "drtune", "x0"),
    ],
)
def test_zero_at_the_start(tiny_path: Path, dtype: torch.dtype, method: str, space: str) -> None:
    k = 2 if method in ("draft", "drtune") else 1
    result = run(problem(tiny_model(tiny_path, dtype=dtype), objective(k, space, method), STEPS, GUIDANCE), folded=True)
    assert result.penalties["kl"].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_at_the_start_of_full_fine_tuning(tiny_path: Path, dtype: torch.dtype) -> None:
    made = tiny_model(tiny_path, dtype=dtype, full=True)
    assert run(problem(made, objective(3), STEPS, GUIDANCE)).penalties["kl"].item() == 0.0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("k", "space", "full"),
    [(1, "noise", False), (3, "noise", False), (3, "x0", False), (1, "noise", True), (3, "x0", True)],
)
def test_equals_the_formula_after_three_updates(
    tiny_path: Path, tmp_path: Path, k: int, space: str, full: bool
) -> None:
    made = tiny_model(tiny_path, lora=ATTENTION, full=full)
    setting = problem(made, objective(k, space), STEPS, GUIDANCE)
    train(made, setting)
    found = run(setting, folded=True).penalties["kl"].item()

    made.tuned.save(tmp_path)
    tuned, reference = stock_pipeline(tiny_path), stock_pipeline(tiny_path)
    if full:
        tuned.unet = type(tuned.unet).from_pretrained(tmp_path, torch_dtype=torch.float64)
    else:
        tuned.load_lora_weights(tmp_path)
        tuned.unet.to(torch.float64)
    expected = formula(tuned, reference, k, space)
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def formula(tuned: Any, reference: Any, k: int, space: str) -> float:
    """mean over (the last k steps, b, c, h, w) of (eps_theta - eps_ref)^2, both guided, at the same x_t."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(STEPS)
    given, without = tuned.encode_prompt(PROMPTS, "cpu", 1, True)
    x, terms = noise_source(3)("x_T", 0), []
    for i, t in enumerate(scheduler.timesteps):
        eps = _guided(tuned.unet, x, t, without, given)
        out = scheduler.step(eps, t, x)
        if i >= STEPS - k:
            frozen = _guided(reference.unet, x, t, without, given)
            x0 = scheduler.step(frozen, t, x).pred_original_sample
            terms.append(eps - frozen if space == "noise" else out.pred_original_sample - x0)
        x = out.prev_sample
    return torch.stack(terms).square().mean().item()


def _guided(unet: Any, x: Tensor, t: Tensor, without: Tensor, given: Tensor) -> Tensor:
    u, c = (unet(x, t, encoder_hidden_states=hidden).sample for hidden in (without, given))
    return u + GUIDANCE * (c - u)


def test_guidance_enters_the_penalty_once(tiny_path: Path) -> None:
    """Guidance scales the difference of both predictions alike, so the penalty is not that of unguided ones."""
    made = tiny_model(tiny_path, lora=ATTENTION)
    train(made, problem(made, objective(1), STEPS, GUIDANCE))
    found = [run(problem(made, objective(1), STEPS, scale)).penalties["kl"].item() for scale in (1.0, GUIDANCE, 8.0)]
    assert len(set(found)) == 3


def test_the_coefficient_multiplies_it(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, lora=ATTENTION)
    train(made, problem(made, objective(1), STEPS, GUIDANCE))
    losses = []
    for coeff in (0.0, 0.5, 2.0):
        losses.append(run(problem(made, ObjectiveConfig("draft", 1, kl_coeff=coeff), STEPS, GUIDANCE)))
    kl = losses[1].penalties["kl"].item()
    assert losses[0].penalties["kl"].item() == 0.0 < kl == losses[2].penalties["kl"].item()
    for result, coeff in zip(losses[1:], (0.5, 2.0), strict=True):
        assert (result.value - losses[0].value).item() == pytest.approx(coeff * kl, rel=1e-9)
