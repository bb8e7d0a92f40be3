"""The rivals of benchmarks/lpips.py compute the same distances, and a missed target is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from draftplus.metrics.lpips import pairwise_lpips

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lpips.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_lpips", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_ways_agree(script: ModuleType) -> None:
    images = script.pictures(5, 40)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = pairwise_lpips(images)[tuple(torch.tensor(pairs).T)]
    assert 0 < expected[0] < 1e-4 < expected[1:].min(), "the first two are nearly the same"
    for distances in (script.each_pair(images, pairs), script.cached(images, 1), script.cached(images, 3)):
        torch.testing.assert_close(distances, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("target", "missed"), [(0.0, 0), (1e9, 2)])
def test_a_missed_target_is_said(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, target: float, missed: int
) -> None:
    monkeypatch.setattr(script, "TARGETS", {"each pair": target, "cached": target})
    assert script.measure(4, 32, 1, 2, False) == missed
    said = capsys.readouterr().out
    assert said.count("MISSED") == missed and "extrapolated from 2 pairs" in said
