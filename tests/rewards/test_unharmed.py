"""A user's reward changes nothing but its score: neither the images, nor what all code in the process shares."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import draftplus
from draftplus.config import RewardConfig
from draftplus.rewards.combined import Combined
from draftplus.rewards.custom import load_custom
from tests.support.rewards import redness
from tests.support.runs import configure, rows, weights
from tests.tiny import CPU

CHANGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "torch.set_default_dtype(torch.float64)": ("torch's default dtype", torch.get_default_dtype),
    "torch.set_default_device('meta')": ("torch's default device", torch.get_default_device),
    "torch.set_grad_enabled(not torch.is_grad_enabled())": (
        "whether gradients are recorded", torch.is_grad_enabled,
    ),
    "torch.use_deterministic_algorithms(True)": (
        "torch's deterministic algorithms", torch.are_deterministic_algorithms_enabled,
    ),
    "torch.set_float32_matmul_precision('medium')": (
        "torch's precision of matrix products", torch.get_float32_matmul_precision,
    ),
    "torch.backends.cudnn.benchmark = True": ("cuDNN's settings", lambda: torch.backends.cudnn.benchmark),
    "torch.set_autocast_enabled('cpu', True)": ("torch's autocast", lambda: torch.is_autocast_enabled("cpu")),
    "torch.autograd.set_detect_anomaly(True)": ("torch's anomaly detection", torch.is_anomaly_enabled),
    "torch.set_num_threads(2)": ("torch's number of threads", torch.get_num_threads),
    "os.chdir('/')": ("the working directory", os.getcwd),
    "warnings.simplefilter('error')": ("the warnings' filters", lambda: list(warnings.filters)),
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": (
        "the handlers of signals", lambda: signal.getsignal(signal.SIGTERM),
    ),
    "sys.setrecursionlimit(20000)": ("the recursion limit", sys.getrecursionlimit),
}  # fmt: skip
numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module that runs a statement when it is imported, when its reward is made, and when that is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def write(imported: str = "", made: str = "", called: str = "") -> str:
        name = f"harmful_{next(numbers)}"
        Path(f"{name}.py").write_text(
            f"import os, random, signal, sys, warnings\nimport numpy, torch\n{imported}\n"
            f"def make():\n    {made or 'pass'}\n    return score\n"
            "def score(images, prompts):\n    found = images.mean((1, 2, 3))\n"
            f"    {called or 'pass'}\n    return found\n"
        )
        return name

    return write


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("statement", CHANGES)
def test_what_it_changed_is_set_back_and_said_once(
    module: Callable[..., str], statement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, read = CHANGES[statement]
    before = read()
    for when, name in (
        ("imported", module(imported=statement)), ("made", module(made=statement)), ("called", module(called=statement))
    ):  # fmt: skip
        spec = f"{name}:{'make' if when == 'made' else 'score'}"
        reward = load_custom(spec, None, {}, CPU, torch.float32)
        for _ in range(2):
            assert torch.equal(reward(images(), ["", ""]), images().mean((1, 2, 3)))
        assert read() == before
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and spec in said[0] and what in said[0] and f"when it was {when}" in said[0]


def test_also_where_it_fails(module: Callable[..., str]) -> None:
    name = module(called="torch.set_default_dtype(torch.float64); raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        load_custom(f"{name}:score", None, {}, CPU, None)(images(), ["", ""])
    assert torch.get_default_dtype() == torch.float32


def test_images_and_prompts_are_its_own(module: Callable[..., str]) -> None:
    """The next reward scores what was made, and the gradient is that of the untouched images."""
    spec = f"{module(called='images.mul_(0); images.data.zero_(); prompts.clear()')}:score"
    seen: list[tuple[Tensor, list[str]]] = []

    class Next:
        differentiable = True

        def __call__(self, given: Tensor, prompts: list[str]) -> Tensor:
            seen.append((given.detach().clone(), list(prompts)))
            return redness(given, prompts)

    harmful = load_custom(spec, None, {}, CPU, None)
    given, prompts = images(), ["a", "b"]
    Combined({"harmful": (harmful, 1.0), "next": (Next(), 1.0)})(given, prompts).total.sum().backward()
    assert torch.equal(seen[0][0], images()) and seen[0][1] == prompts == ["a", "b"]
    expected = images()
    (expected.mean((1, 2, 3)) + redness(expected, prompts)).sum().backward()
    assert torch.equal(given.grad, expected.grad)


def test_its_randomness_is_its_own(module: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """Draws go on from call to call as by itself; a seed that it sets seeds nobody else, and nothing is said."""
    draws = "found = found + torch.rand(()) + numpy.random.rand() + random.random()"
    reward = load_custom(f"{module(called=draws)}:score", None, {}, CPU, None)
    seeding = load_custom(
        f"{module(called='torch.manual_seed(0); numpy.random.seed(0); random.seed(0)')}:score", None, {}, CPU, None
    )
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    expected = [float(torch.rand(()) + numpy.random.rand() + random.random()) for _ in range(2)]
    after = []
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    for _ in range(2):
        found = reward(images(1), [""])
        seeding(images(1), [""])
        assert float((found - images(1).mean((1, 2, 3))).detach()) == pytest.approx(expected[len(after)], abs=1e-5)
        after.append(float(torch.rand(()) + numpy.random.rand() + random.random()))
    assert after == expected
    assert not capsys.readouterr().err


def test_a_run_and_its_pictures_are_those_of_a_reward_that_behaves(
    settings: list[str], module: Callable[..., str], tmp_path: Path
) -> None:
    bad = module(
        called="torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); os.chdir('/'); images.zero_()"
    )
    runs = []
    for name in (module(), bad):
        config = configure([*settings, f"name={name}", "train.steps=2"])
        config.reward = {f"{name}:score": RewardConfig()}
        runs.append(draftplus.train(config))
    good, other = (weights(run / "adapter") for run in runs)
    assert all(torch.equal(good[name], other[name]) for name in good)
    pictures = [sorted((run / "samples").rglob("*.png")) for run in runs]
    assert [p.read_bytes() for p in pictures[0]] == [p.read_bytes() for p in pictures[1]] != []
    assert len(rows(runs[1] / "metrics.jsonl")) == 2
