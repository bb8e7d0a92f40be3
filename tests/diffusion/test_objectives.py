"""The methods differ from one another, and report what they were computed from."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.config import LoraConfig, ObjectiveConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.diffusion.objectives import Loss, loss, plan, prefix
from draftplus.diffusion.sampler import Rollout
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.types import Conditioning
from tests.tiny import PROMPTS, SHAPE, TinyScorer, gradients, noise_source, normal, problem, randomize, tiny_model

STEPS = 4


def run(made: StableDiffusion, objective: ObjectiveConfig, step: int = 0, seed: int = 0) -> Loss:
    setting, noise = problem(made, objective, STEPS), noise_source(3)
    planned, conditioning = plan(objective, setting.sampler.schedule, seed, step), made.encode(PROMPTS)
    return loss(setting, prefix(setting, conditioning, noise, planned), planned, conditioning, PROMPTS, noise)


def family() -> dict[str, ObjectiveConfig]:
    alignprop = ObjectiveConfig("alignprop")
    alignprop.alignprop.min_steps = 2
    stopping = ObjectiveConfig("drtune", 3)
    stopping.drtune.early_stop = 2
    return {
        "draft-2": ObjectiveConfig("draft", 2),
        "draft-3": ObjectiveConfig("draft", 3),
        "draft-all": ObjectiveConfig("draft", "all"),
        "alignprop": alignprop,
        "drtune-2": ObjectiveConfig("drtune", 2),
        "drtune-3": ObjectiveConfig("drtune", 3),
        "drtune-all": ObjectiveConfig("drtune", "all"),
        "drtune-stop": stopping,
        "draft-1": ObjectiveConfig("draft", 1),
        "draft_lv": ObjectiveConfig("draft_lv", 1),
        "refl": ObjectiveConfig("refl", 1),
        "draft+-2": ObjectiveConfig("draft", 2, kl_coeff=1.0),
        "draft+-2-x0": ObjectiveConfig("draft", 2, kl_coeff=1.0, kl_space="x0"),
    }


@pytest.fixture(scope="module")
def steps_gradients(tiny_path: Path) -> dict[str, Tensor]:
    """Of each method, the gradients of two optimizer steps, side by side."""
    made = tiny_model(tiny_path, lora=LoraConfig(rank=2, alpha=4.0))
    randomize(made)
    found = {}
    for name, objective in family().items():
        rows = [gradients(made.tuned.trainable(), run(made, objective, step, seed=2).value) for step in range(2)]
        found[name] = torch.cat([grad.flatten() for row in rows for grad in row.values()])
    return found


@pytest.mark.parametrize("pair", list(combinations(family(), 2)), ids="/".join)
def test_each_pair_of_methods_differs(steps_gradients: dict[str, Tensor], pair: tuple[str, str]) -> None:
    first, second = (steps_gradients[name] for name in pair)
    assert (first - second).norm() > 1e-3 * first.norm() > 0


def test_detaching_inputs_is_what_tells_drtune_from_draft(model: StableDiffusion) -> None:
    """With every step in the window both see the same images and scores, and differ in their gradient."""
    draft, drtune = (run(model, ObjectiveConfig(method, "all")) for method in ("draft", "drtune"))
    assert torch.equal(draft.images, drtune.images) and torch.equal(draft.value, drtune.value)
    a, b = (gradients(model.tuned.trainable(), result.value) for result in (draft, drtune))
    assert not any(torch.allclose(a[name], b[name]) for name in a)


def test_one_copy_of_draft_lv_is_not_none(model: StableDiffusion) -> None:
    values = []
    for samples in (1, 2, 3):
        objective = ObjectiveConfig("draft_lv", 1)
        objective.draft_lv.samples = samples
        values.append(run(model, objective).value.item())
    assert len({run(model, ObjectiveConfig("draft", 1)).value.item(), *values}) == 4


@pytest.mark.parametrize("method", ["draft", "draft_lv", "refl", "drtune"])
def test_what_is_reported(model: StableDiffusion, method: str) -> None:
    k = 2 if method in ("draft", "drtune") else 1
    result = run(model, ObjectiveConfig(method, k, kl_coeff=0.3))
    assert result.value.requires_grad and result.value.shape == result.penalties["kl"].shape == ()
    for tensor in (result.penalties["kl"], result.images, result.scores.total, result.scores.parts["tiny"]):
        assert not tensor.requires_grad
    assert result.images.shape == (3, 3, 16, 16) and result.images.min() >= 0 and result.images.max() <= 1
    torch.testing.assert_close(result.scores.total, TinyScorer().scores(result.images, PROMPTS))
    if method != "draft_lv":
        torch.testing.assert_close(result.value.detach(), -result.scores.total.mean() + 0.3 * result.penalties["kl"])


def test_the_images_scored_are_those_of_plain_sampling(model: StableDiffusion) -> None:
    result = run(model, ObjectiveConfig("draft", 3))
    setting = problem(model, ObjectiveConfig("draft", 3), STEPS)
    start = Rollout(noise_source(3)("x_T", 0))
    with torch.no_grad():
        rollout = setting.sampler.sample(model.encode(PROMPTS), start)
        images = model.decode(rollout.latents)
    torch.testing.assert_close(result.images, images)


def test_a_batch_is_the_mean_of_its_images(model: StableDiffusion) -> None:
    """No image's loss depends on its neighbours, and each is scored against its own prompt."""
    objective = ObjectiveConfig("draft", 2, kl_coeff=0.5)
    setting, noise = problem(model, objective, STEPS), noise_source(3)
    planned = plan(objective, setting.sampler.schedule, 0, 0)
    values = []
    for i in range(3):
        one, conditioning = slice(i, i + 1), model.encode(PROMPTS[i : i + 1])

        def row(stream: str, draw: int, one: slice = one) -> Tensor:
            return noise(stream, draw)[one]

        start = prefix(setting, conditioning, row, planned)
        values.append(loss(setting, start, planned, conditioning, PROMPTS[one], row).value.detach())
    torch.testing.assert_close(run(model, objective).value.detach(), torch.stack(values).mean(), rtol=1e-10, atol=0)


class Counting:
    """Records what the denoiser is called with."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append((len(latents), len(conditioning)))
        return latents * conditioning.hidden.mean((1, 2))[:, None, None, None]


@pytest.mark.parametrize(("scale", "batch"), [(0.0, 3), (1.0, 3), (1.5, 6), (4.0, 6)])
def test_guidance(scale: float, batch: int) -> None:
    made: Any = Counting()
    given, without = Conditioning(normal(3, 5, 4, seed=1)), Conditioning(normal(1, 5, 4, seed=2))
    x = normal(3, *SHAPE)
    found = classifier_free(made.predict, given, without, scale)(x, torch.tensor(1))
    assert made.batches == [(batch, batch)]
    c = x * given.hidden.mean((1, 2))[:, None, None, None]
    u = x * without.hidden.mean()
    torch.testing.assert_close(found, u + max(scale, 1.0) * (c - u))


def test_guidance_carries_the_extras_of_each_row() -> None:
    seen: list[Tensor] = []

    class Pooled(Counting):
        def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            seen.append(conditioning.extras["pooled"])
            return latents

    given = Conditioning(normal(2, 5, 4), extras={"pooled": torch.tensor([[1.0], [2.0]])})
    without = Conditioning(normal(1, 5, 4), extras={"pooled": torch.tensor([[9.0]])})
    classifier_free(Pooled().predict, given, without, 2.0)(normal(2, *SHAPE), torch.tensor(1))
    assert seen[0].flatten().tolist() == [9.0, 9.0, 1.0, 2.0]
