"""The blocks of every family's denoiser are compiled whole, and predict what they did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from draftplus.build import build_model
from draftplus.config import ModelConfig
from draftplus.models import compiling
from tests.families.cases import ONCE, Case

pytestmark = pytest.mark.slow


@pytest.fixture(params=ONCE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, which is what a family may make impossible, and run as they are."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_predictions(case: Case, directory: Path) -> None:
    model: Any = build_model(ModelConfig(path=str(directory)), torch.device("cpu"))
    shape = model.latent_shape(*case.sizes[0])
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        predicted = model.guided(model.encode(["a cat", "two dogs"]), None, case.guided)(noise, torch.tensor(500.0))
        predicted.square().mean().backward()
        found = [parameter.grad for name, parameter in model.tuned.trainable().items() if "lora_B" in name]
        for parameter in model.tuned.trainable().values():
            parameter.grad = None
        return [predicted.detach(), *found]

    plain = gradients()
    model.compile()
    compiled = gradients()
    assert counters["stats"]["unique_graphs"] > 0
    assert any(float(gradient.abs().max()) > 0 for gradient in plain[1:])
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
