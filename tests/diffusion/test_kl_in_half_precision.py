"""The KL term measures how far two models are apart, whatever the frozen weights' precision.

In half precision two predictions differ by rounding, which guidance magnifies, even where the models hardly differ. The
UNet here is wide enough for that to be more than a young adapter's distance.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from draftplus.config import Config, LoraConfig, ObjectiveConfig
from draftplus.config.schema import TrainConfig
from draftplus.distributed import World
from draftplus.models.stable_diffusion import ATTENTION, StableDiffusion
from draftplus.models.tuned import make_tuned
from draftplus.training.ddpo import ddpo_step
from draftplus.training.placement import Replicated
from draftplus.training.state import initial_state
from draftplus.training.step import Setup, accumulate
from draftplus.types import Scores
from tests.tiny import CPU, problem, randomize, tiny_model

GUIDANCE, SHAPE = 7.5, (4, 8, 8)  # of latents


class Nothing:
    """A reward that is always 0, so that all of the gradient is the penalty's."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Any) -> Scores:
        total = images.flatten(1).sum(1) * 0
        return Scores(total, {"nothing": total.detach()})


@pytest.fixture(scope="module")
def wide(tiny_path: Path) -> StableDiffusion:
    """A UNet of 64, 128 and 256 channels, in float32, its weights what bfloat16 and float16 can hold."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(64, 128, 256), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        )  # fmt: skip
    unet.to(torch.bfloat16).float()
    made = tiny_model(tiny_path, dtype=torch.float32)
    made.tuned = make_tuned(
        unet.requires_grad_(False).eval(), StableDiffusionPipeline, LoraConfig(4, 4.0), 0, True, ATTENTION
    )
    return made


def in_precision(model: StableDiffusion, dtype: torch.dtype, checkpointing: bool = False) -> StableDiffusion:
    """The same model, its frozen denoiser rounded."""
    made = copy.deepcopy(model)
    randomize(made, size=0.01)
    for parameter in made.unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpointing:
        made.unet.enable_gradient_checkpointing()
    return made


def setup_of(model: StableDiffusion, method: str = "draft", micro: int = 1, **settings: Any) -> Setup:
    objective = ObjectiveConfig(method, "all" if method == "ddpo" else 1, kl_coeff=1.0, **settings)
    eta = 1.0 if method == "ddpo" else 0.0
    given = problem(model, objective, steps=2, guidance_scale=GUIDANCE, eta=eta)
    object.__setattr__(given, "scorer", Nothing())
    config = Config(objective=objective, train=TrainConfig(global_batch_size=2, micro_batch_size=micro))
    here = World(0, 1, CPU)
    return Setup(config, given, ["a cat", "a bee"], SHAPE, micro, here, Replicated(here))


def kl_and_gradient(model: StableDiffusion, micro: int = 1) -> tuple[float, Tensor]:
    made = setup_of(model, micro=micro)
    told = accumulate(made, 0)
    trained = model.tuned.trainable().values()
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
    return told.named(told.vector)["kl"], gradient


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(a[name].dtype == tensor.dtype and torch.equal(a[name], tensor) for name, tensor in b.items())


@pytest.fixture(scope="module")
def expected(wide: StableDiffusion) -> tuple[float, Tensor]:
    """In float32."""
    return kl_and_gradient(in_precision(wide, torch.float32))


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "micro"),
    [(torch.bfloat16, False, 1), (torch.bfloat16, True, 2), (torch.float16, False, 2)],
)
def test_it_is_float32_s_in_value_and_gradient(
    wide: StableDiffusion, expected: tuple[float, Tensor], dtype: torch.dtype, checkpointing: bool, micro: int
) -> None:
    """Also where the backward pass computes again, and over several micro-batches."""
    model = in_precision(wide, dtype, checkpointing)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    value, gradient = kl_and_gradient(model, micro)
    assert value == pytest.approx(expected[0], rel=0.1)
    assert distance(gradient, expected[1]) < 0.1
    after = model.unet.state_dict()
    assert {str(tensor.dtype) for tensor in after.values()} == {str(dtype), "torch.float32"}
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


def test_without_it_rounding_is_most_of_it(
    wide: StableDiffusion, expected: tuple[float, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above would not see at a smaller size."""
    model = in_precision(wide, torch.bfloat16)
    monkeypatch.setattr(model.tuned, "widened", nullcontext)
    value, gradient = kl_and_gradient(model)
    assert value > 3 * expected[0]
    assert distance(gradient, expected[1]) > 0.5


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
def test_convolutions_of_gpus_are_not_in_tf32_where_it_is_compared(fresh: StableDiffusion, coefficient: float) -> None:
    made = setup_of(fresh)
    made.problem.objective.kl_coeff = coefficient
    before, seen = torch.backends.cudnn.allow_tf32, []
    model = made.problem.model
    model.unet.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))  # type: ignore[attr-defined]
    assert before
    accumulate(made, 0)
    tail = seen[1:]  # after the one step without gradient
    assert seen[0] is True and tail == ([False, False] if coefficient else [True]) * 2
    assert torch.backends.cudnn.allow_tf32 is True


def test_ddpo_s_first_ratio_is_one(fresh: StableDiffusion) -> None:
    """Rollouts and updates are in the same precision, or the clip, 1e-4, would cut all."""
    model = in_precision(fresh, torch.bfloat16)
    setup = setup_of(model, "ddpo", micro=2)
    seen: list[torch.dtype] = []
    model.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    state = initial_state(model.tuned.trainable(), setup.config.optim)
    means = ddpo_step(setup, state, nullcontext)
    assert means["ddpo/ratio"] == 1.0
    assert set(seen) == {torch.float32}
    assert model.unet.conv_in.base_layer.weight.dtype == torch.bfloat16


def test_an_error_inside_leaves_the_weights_as_they_were(fresh: StableDiffusion) -> None:
    model = in_precision(fresh, torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    with pytest.raises(ZeroDivisionError), model.tuned.widened():
        raise ZeroDivisionError
    after = model.unet.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
