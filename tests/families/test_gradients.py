"""Gradients of every family against those through the stock pipeline's own call, in float64.

The stock pipeline samples, guides, unpacks and decodes; its callback cuts the graph where a window begins. For the KL
term a second stock pipeline, untouched, is led along the same latents. Nothing of draftplus is called for either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus.build import build_sampler
from draftplus.config import ObjectiveConfig, SamplerConfig
from draftplus.diffusion.objectives import loss, plan, prefix
from draftplus.diffusion.problem import Problem
from tests.families.cases import ONCE, PROMPTS, Case, drawing, load_model, stock_pipe
from tests.families.conftest import Below
from tests.tiny import TinyScorer, gradients, normal, randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS, PENALTY = 4, 0.7
SIZE = 1  # of the case's, the one that is not square


def through_stock(pipe: Any, prompt: str, noise: Tensor, first: int, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """The picture (1, 3, H, W) and the latents after each step, with gradient from step `first` on."""
    after: list[Tensor] = []

    def cut(_: Any, step: int, __: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = given["latents"].detach() if step == first - 1 else given["latents"]
        after.append(latents)
        return {"latents": latents}

    call = type(pipe).__call__.__wrapped__  # without torch.no_grad()
    with drawing(pipe, noise):
        images = call(pipe, prompt=prompt, output_type="pt", callback_on_step_end=cut, **arguments).images
    return images, after


@torch.no_grad()
def led_along(pipe: Any, prompt: str, noise: Tensor, path: list[Tensor], **arguments: Any) -> list[Tensor]:
    """Where the pipeline's own steps lead from the latents of another one's path."""
    after: list[Tensor] = []

    def lead(_: Any, step: int, __: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append(given["latents"])
        return {"latents": path[step].detach()}

    with drawing(pipe, noise):
        pipe(prompt=prompt, output_type="latent", callback_on_step_end=lead, **arguments)
    return after


def by_stock(case: Case, directory: Path, tuned: Any, prompt: str, noise: Tensor, first: int, kl: float) -> Tensor:
    """The loss of one image: -reward + kl * mean over steps and latents of the squared difference of noises."""
    pipe, untouched = stock_pipe(directory, torch.float64), stock_pipe(directory, torch.float64)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, component, tuned)
    arguments = case.call(case.sizes[SIZE], STEPS, case.guided, case.needs)
    images, after = through_stock(pipe, prompt, noise, first, **arguments)
    theirs = led_along(untouched, prompt, noise, after, **arguments)
    sigmas = pipe.scheduler.sigmas.double()
    flow = "FlowMatch" in type(pipe.scheduler).__name__
    distances = []
    for step in range(first, STEPS):
        # an Euler step is x + (sigma' - sigma) u, where eps = x + (1 - sigma) u for flow matching, and u = eps else;
        # the frozen network is no function of x, as far as gradient goes
        before = after[step - 1]
        ours, frozen = after[step] - before, theirs[step] - before.detach()
        difference = (ours - frozen) / (sigmas[step + 1] - sigmas[step])
        distances.append(((1 - sigmas[step]) * difference if flow else difference).square().mean())
    return -TinyScorer().scores(images, [prompt]).mean() + kl * torch.stack(distances).mean()


@pytest.fixture(params=ONCE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("k", [1, 3])
def test_draft_plus(case: Case, directory: Path, full: bool, k: int, below: Below) -> None:
    """Value and gradient of DRaFT-K with the KL term, of a model that has moved away from the frozen one."""
    model = load_model(directory, **({"lora": None} if full else {}))
    randomize(model, size=0.05 if full else 0.2)
    prompts, size = PROMPTS[:2], case.sizes[SIZE]
    sampling = SamplerConfig(
        steps=STEPS, guidance_scale=case.guided, height=size[0], width=size[1], negative_prompt=case.needs
    )  # fmt: skip
    problem = Problem(build_sampler(model, sampling), TinyScorer(), ObjectiveConfig("draft", k, kl_coeff=PENALTY))
    noise = normal(2, *model.latent_shape(*size), seed=3).float().double()
    planned = plan(problem.objective, problem.sampler.schedule, 0, 0)
    conditioning = model.encode(prompts)

    def draw(stream: str, number: int) -> Tensor:
        return noise

    start = prefix(problem, conditioning, draw, planned)
    ours = loss(problem, start, planned, conditioning, prompts, draw).value
    found = gradients(model.tuned.trainable(), ours)

    theirs = torch.stack(
        [
            by_stock(case, directory, model.tuned.denoiser, prompt, noise[row : row + 1], STEPS - k, PENALTY)
            for row, prompt in enumerate(prompts)
        ]
    ).mean()
    expected = gradients(model.tuned.trainable(), theirs)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    together = [torch.cat([one[name].flatten() for name in sorted(one)]) for one in (found, expected)]
    assert together[1].norm() > 1e-3
    below("gradient, relative", (together[0] - together[1]).norm() / together[1].norm(), 1e-3)


def test_the_reference_is_the_untouched_model(case: Case, directory: Path) -> None:
    """Bit for bit: with adapters off, and the frozen copy of a fully tuned denoiser."""
    untouched = load_model(directory, trainable=False)
    size = case.sizes[SIZE]
    x = normal(1, *untouched.latent_shape(*size), seed=4)
    given = untouched.encode(PROMPTS[:1])
    with torch.no_grad():
        expected = untouched.guided(given, case.needs, case.guided)(x, torch.tensor(500.0))
        for settings in ({}, {"lora": None}):
            model = load_model(directory, **settings)
            randomize(model)
            moved = model.guided(given, case.needs, case.guided)
            assert not torch.equal(moved(x, torch.tensor(500.0)), expected)
            with model.tuned.reference():
                assert torch.equal(moved(x, torch.tensor(500.0)), expected)


def test_folding_leaves_the_weights(case: Case, directory: Path) -> None:
    model = load_model(directory)
    randomize(model)
    size = case.sizes[SIZE]
    x, given = normal(1, *model.latent_shape(*size), seed=4), model.encode(PROMPTS[:1])
    before = {name: tensor.clone() for name, tensor in model.tuned.denoiser.state_dict().items()}
    raw = model.guided(given, case.needs, case.guided)
    with torch.no_grad():
        unfolded = raw(x, torch.tensor(500.0))
        with model.tuned.folded():
            torch.testing.assert_close(raw(x, torch.tensor(500.0)), unfolded, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.tuned.denoiser.state_dict().items())


def test_gradient_checkpointing_changes_nothing(case: Case, directory: Path) -> None:
    size, found = case.sizes[SIZE], []
    for checkpointed in (False, True):
        model = load_model(directory, gradient_checkpointing=checkpointed)
        randomize(model)
        model.tuned.denoiser.train()
        x = normal(1, *model.latent_shape(*size), seed=4)
        images = model.decode(model.guided(model.encode(PROMPTS[:1]), case.needs, case.guided)(x, torch.tensor(500.0)))
        found.append(gradients(model.tuned.trainable(), images.square().sum()))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-9, atol=1e-12) for name in found[0])
    assert any(tensor.abs().max() > 0 for tensor in found[0].values())


def test_frozen_weights_in_half_precision(case: Case, directory: Path) -> None:
    """The adapters and their gradient are in float32, and it is nearly that of a model in float32."""
    size, found = case.sizes[SIZE], []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(directory, dtype=dtype)
        randomize(model)
        trained = model.tuned.trainable()
        assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
        ours = {id(tensor) for tensor in trained.values()}
        frozen = (*model.tuned.denoiser.parameters(), *model.vae.parameters())
        assert {tensor.dtype for tensor in frozen if id(tensor) not in ours} == {dtype}
        x = normal(1, *model.latent_shape(*size), seed=4).float()
        images = model.decode(model.guided(model.encode(PROMPTS[:1]), case.needs, case.guided)(x, torch.tensor(500.0)))
        made = gradients(trained, images.square().sum())
        assert {tensor.dtype for tensor in made.values()} == {torch.float32}
        found.append(torch.cat([tensor.flatten() for _, tensor in sorted(made.items())]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95
