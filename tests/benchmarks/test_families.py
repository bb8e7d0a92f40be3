"""The benchmark of families knows each of them, times what is alike on both sides, and says what misses a target."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import families, memory


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FACTORS", {})
    monkeypatch.setattr(families, "SIZE", (64, 64))
    monkeypatch.setattr(families, "STEPS", 2)


def options(name: str, path: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(repeats=1, cpu_time=False, only=[name], json=path)


def test_a_missed_target_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families, "TARGETS", {"step": 0.0, "generate": 1e3})
    assert families.main(options("zimage", tmp_path / "found.json")) == 1
    assert "| MISSED: step |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["family"] == "ZImagePipeline" and set(row["ratio"]) == {"step", "generate"}


def test_other_pictures_than_those_of_stock_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = families.generate_images
    monkeypatch.setattr(families, "generate_images", lambda *given: 0.9 * whole(*given))
    with pytest.raises(SystemExit, match="the pictures differ"):
        families.main(options("sdxl"))


def test_a_pass_that_is_not_seen_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def blind(config: Any, model: Any, rewards: Any) -> Any:
        monkeypatch.setattr(model.vae, "decoder", torch.nn.Identity())
        return training(config, model, rewards)

    training = families.training
    monkeypatch.setattr(families, "training", blind)
    decode = torch.nn.functional.interpolate
    monkeypatch.setattr("draftplus.models.pipeline.PipelineModel.decode", lambda self, z: decode(z[:, :3], (64, 64)))
    with pytest.raises(RuntimeError, match="no pass of vae"):
        families.works("sdxl", tmp_path)


def test_convolutions_through_float32_are_convolutions() -> None:
    generator = torch.Generator().manual_seed(0)
    given, weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((1, 4, 9, 8), (6, 4, 3, 3), (6,)))
    found = []
    for convolution, dtype in ((memory.conv2d, torch.bfloat16), (memory.CONVOLUTION, torch.float32)):
        x = given.clone().to(dtype).requires_grad_()
        y = convolution(x, weight.to(dtype), bias.to(dtype), 2, 1)
        y.float().square().sum().backward()
        assert y.dtype == dtype
        found.append((y.float(), x.grad.float()))
    for ours, stock in zip(*found, strict=True):
        assert float((ours - stock).norm()) < 0.005 * float(stock.norm())
