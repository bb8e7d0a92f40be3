"""The frozen model stays frozen: folding, switching adapters off, and what a live graph sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from draftplus.config import LoraConfig, ModelConfig
from draftplus.errors import UserError
from draftplus.models.lora import layers
from draftplus.models.stable_diffusion import StableDiffusion, load
from tests.tiny import CPU, PROMPTS, SHAPE, gradients, normal, randomize, tiny_model

X, T = normal(3, *SHAPE), torch.tensor(300)


def predict(made: StableDiffusion) -> Tensor:
    return made.predict(X, T, made.encode(PROMPTS))


def state(made: StableDiffusion) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.unet.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    # by bits: -0.0 is not 0.0
    def bits(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return first.keys() == second.keys() and all(torch.equal(bits(first[n]), bits(second[n])) for n in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_leaves_every_bit(tiny_path: Path, dtype: torch.dtype) -> None:
    made = tiny_model(tiny_path, dtype)
    randomize(made)
    before, pointers = state(made), [p.data_ptr() for p in made.unet.parameters()]
    for _ in range(3):
        with made.tuned.folded(), torch.no_grad():
            predict(made)
    with pytest.raises(KeyError), made.tuned.folded():
        raise KeyError
    assert same(before, state(made))
    assert pointers == [p.data_ptr() for p in made.unet.parameters()]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_folded_predictions_are_the_adapters(tiny_path: Path, targets: str) -> None:
    made = tiny_model(tiny_path, lora=LoraConfig(rank=2, alpha=4.0, targets=targets))
    randomize(made)
    with torch.no_grad():
        unfolded = predict(made)
        with made.tuned.folded():
            folded = predict(made)
        with made.tuned.reference():
            base = predict(made)
    torch.testing.assert_close(folded, unfolded, rtol=1e-11, atol=1e-12)
    assert (folded - base).abs().max() > 1e-2


def test_folding_follows_the_scale(model: StableDiffusion) -> None:
    model.tuned.set_scale(0.3)
    with torch.no_grad():
        unfolded = predict(model)
        with model.tuned.folded():
            torch.testing.assert_close(predict(model), unfolded, rtol=1e-11, atol=1e-12)


def test_folding_runs_no_adapter(model: StableDiffusion) -> None:
    calls = []
    for layer in layers(model.unet):
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        with model.tuned.folded():
            predict(model)
        assert not calls
        predict(model)
    assert len(calls) == len(layers(model.unet))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_folded(tiny_path: Path, dtype: torch.dtype) -> None:
    made = tiny_model(tiny_path, dtype)
    randomize(made, size=1e-3)  # a young adapter, which would be rounded away
    before = state(made)
    with torch.no_grad():
        unfolded = predict(made)
        with made.tuned.folded():
            assert same(before, state(made))
            assert torch.equal(predict(made), unfolded)


def test_folding_between_forward_and_backward(model: StableDiffusion) -> None:
    expected = gradients(model.tuned.trainable(), predict(model).square().sum())
    value = predict(model).square().sum()
    with model.tuned.folded(), torch.no_grad():
        predict(model)
    for name, grad in gradients(model.tuned.trainable(), value).items():
        assert torch.equal(grad, expected[name]), name


def test_a_fully_tuned_denoiser_folds_to_itself(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, full=True)
    randomize(made)
    with torch.no_grad():
        unfolded = predict(made)
        with made.tuned.folded():
            assert torch.equal(predict(made), unfolded)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_reference_is_the_stock_denoiser_bit_for_bit(tiny_path: Path, dtype: torch.dtype, full: bool) -> None:
    made = tiny_model(tiny_path, dtype, full=full)
    randomize(made)
    unet = UNet2DConditionModel.from_pretrained(tiny_path / "unet", torch_dtype=dtype)
    hidden = made.encode(PROMPTS).hidden
    with torch.no_grad():
        stock = unet(X.to(dtype), T, encoder_hidden_states=hidden).sample
        with made.tuned.reference():
            assert torch.equal(predict(made), stock)
        assert not torch.equal(predict(made), stock)
        with pytest.raises(KeyError), made.tuned.reference():
            raise KeyError
        assert not torch.equal(predict(made), stock)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_disturbs_no_graph(tiny_path: Path, full: bool) -> None:
    made = tiny_model(tiny_path, full=full)
    randomize(made)
    parameters = made.tuned.trainable()
    flags = {name: p.requires_grad for name, p in made.unet.named_parameters()}
    expected = gradients(parameters, predict(made).square().sum())

    value = predict(made).square().sum()
    with made.tuned.reference():
        if not full:
            assert {name: p.requires_grad for name, p in made.unet.named_parameters()} == flags
        with torch.no_grad():
            predict(made)
    assert {name: p.requires_grad for name, p in made.unet.named_parameters()} == flags
    for name, grad in gradients(parameters, value).items():
        assert torch.equal(grad, expected[name]), name
    assert list(made.tuned.trainable()) == list(parameters)


def test_backward_inside_the_reference(model: StableDiffusion) -> None:
    expected = gradients(model.tuned.trainable(), predict(model).square().sum())
    parameters, value = model.tuned.trainable(), predict(model).square().sum()
    with model.tuned.reference():
        found = gradients(parameters, value)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_contexts_nest(model: StableDiffusion) -> None:
    with torch.no_grad():
        tuned = predict(model)
        with model.tuned.reference():
            base = predict(model)
            with model.tuned.reference():
                assert torch.equal(predict(model), base)
            assert torch.equal(predict(model), base)
        assert torch.equal(predict(model), tuned)


def test_adapters_are_drawn_from_the_seed(tiny_path: Path) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        before = torch.get_rng_state()
        made = load(ModelConfig(lora=LoraConfig(targets="all")), str(tiny_path), CPU, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)  # and nothing else's randomness is used up
        return {name: p.detach() for name, p in made.tuned.trainable().items() if "lora_A" in name}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("atention", "choose one of attention, linear, convolution, all"),
        (["to_q", "to_z"], "'to_z'"),
        ([], "give a name or a list"),
        (3, "model.lora.targets is 3"),
    ],
)
def test_targets_that_name_nothing_are_refused(tiny_path: Path, targets: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_model(tiny_path, lora=LoraConfig(targets=targets))
    assert says in str(error.value)
