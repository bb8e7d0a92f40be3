"""The benchmark's floor makes the passes that a step makes, no fewer and no smaller ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftplus.models import lora

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def passes(setup: Any, work: Callable[[], None]) -> list[tuple[Any, ...]]:
    """Each forward of a network: which, its input's shape, whether for a gradient, and whether with adapters."""
    seen: list[tuple[Any, ...]] = []
    layer = lora.layers(setup.model.unet)[0]
    networks = {
        "unet": setup.model.unet.conv_in,
        "vae": setup.model.vae.decoder,
        "reward": setup.rewards["emoji_clip"].model.vision_model,
    }

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = inputs[0] if inputs else keywords["pixel_values"]
            seen.append((name, tuple(given.shape), torch.is_grad_enabled(), not layer._disable_adapters))

        return hook

    handles = [network.register_forward_pre_hook(note(name), with_kwargs=True) for name, network in networks.items()]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.slow
def test_the_floor_is_of_the_same_passes(script: ModuleType) -> None:
    setup = script.Setup(["sampler.steps=3", "train.global_batch_size=2", "train.micro_batch_size=2"])
    floor, frozen = setup.passes()
    expected = passes(setup, setup.step)
    assert passes(setup, floor) == expected
    shape = (4, *setup.shape)
    assert expected[:2] == [("unet", shape, False, False)] * 2, "folded, under guidance"
    assert expected[2] == ("unet", shape, True, True)
    assert [name for name, *_ in expected[3:]] == ["vae", "reward", "unet"]
    assert passes(setup, frozen) == expected[-1:] == [("unet", shape, False, False)]
    before = {name: tensor.clone() for name, tensor in setup.model.unet.state_dict().items()}
    floor()
    after = setup.model.unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "the floor left the model changed"


@pytest.mark.slow
def test_the_floors_of_the_new_terms_too(script: ModuleType) -> None:
    """KL over the trajectory, with and without the window's term; and a gate, once its start noise is known."""
    small = ["sampler.steps=4", "train.global_batch_size=2", "train.micro_batch_size=2"]
    plain, *others = script.STEPS.values()
    assert plain == []
    counts = []
    for overrides in others:
        setup = script.Setup([*small, *overrides])
        if setup.setup.cache is not None:
            setup.step()
        expected = passes(setup, setup.step)
        assert passes(setup, setup.passes()[0]) == expected
        unet = [carries for name, _, carries, _ in expected if name == "unet"]
        counts.append((unet.count(False), unet.count(True)))
    assert counts == [(3 + 2, 2), (3 + 1, 2), (1, 1)]


@pytest.mark.slow
def test_the_tails_differ_by_the_frozen_model_alone(script: ModuleType) -> None:
    setup = script.Setup(["sampler.steps=3", "train.global_batch_size=2", "train.micro_batch_size=2"])
    _, frozen = setup.passes()
    without, given = (passes(setup, setup.tail(coefficient)) for coefficient in (0.0, 0.1))
    assert given == without + passes(setup, frozen)


def test_a_missed_target_is_said(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for seconds, missed in ((0.4, 0), (0.6, 1)):
        monkeypatch.setattr(script, "help_seconds", lambda taken=seconds: taken)
        assert script.main(1, False, ["help"]) == missed
        assert ("MISSED" in capsys.readouterr().out) == bool(missed)
