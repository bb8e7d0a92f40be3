"""What CONTRIBUTING says about adding a reward, a model and a method works as it is written, and so does its walk."""

from __future__ import annotations

import importlib
import json
import re
import sys
import textwrap
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from draftplus import build
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.sampler import Rollout
from draftplus.models.families import FAMILIES, Family
from draftplus.rewards import names
from draftplus.runs.plan import plan_run
from draftplus.training.dry_run import describe
from tests.support.runs import rows, save_small, train_here
from tests.tiny import CPU, normal

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = ["train.steps=2", "eval.every=2"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a file that CONTRIBUTING shows into a package of its own, and imports it."""
    package = tmp_path / "recipes_of_contributing"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> ModuleType:
        (block,) = re.findall(rf"^ *```python\n( *# {name}\.py\n.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
        (package / f"{name}.py").write_text(textwrap.dedent(block))
        for known in [known for known in sys.modules if known.startswith(package.name)]:
            monkeypatch.delitem(sys.modules, known)
        importlib.invalidate_caches()
        return importlib.import_module(f"{package.name}.{name}")

    return write


def test_a_reward(recipe: Any, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(names.REWARDS, "contrast", f"{recipe('my_reward').__name__}:load_contrast")
    run = train_here([*settings, *STEPS, "reward={contrast: {args: {gain: 2.0}}}"])
    first, last = rows(run / "metrics.jsonl")
    assert first["reward/contrast"] > 0 and first["grad_norm"] > 0 and last["step"] == 2


def test_a_method(recipe: Any, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "middle", recipe("my_method").METHOD)
    made = [*settings, *STEPS, "objective.method=middle", "objective.kl_coeff=2"]
    run = train_here(made)
    assert rows(run / "metrics.jsonl")[0]["grad_norm"] > 0 and rows(run / "metrics.jsonl")[1]["kl"] > 0
    told = describe(*plan_run(made[0], made[1:]))
    assert re.search(r"method +Middle\n", told)
    assert re.search(r"passes per image +2 without gradient, 1 with gradient, 1 of the frozen", told)


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    """A pipeline of the class that the recipe's family is for."""
    directory = save_small(tmp_path / "flow")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, "_class_name": "MyFlowPipeline"}))
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(directory / "scheduler")
    return directory


def test_a_model(recipe: Any, flow: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(f"{recipe('my_family').__name__}:load", {"steps": 28, "guidance_scale": 4.0, "negative_prompt": ""})
    monkeypatch.setitem(FAMILIES, "MyFlowPipeline", family)
    run = train_here([*settings, *STEPS, f"model.path={flow}", "objective.kl_coeff=2"])
    assert rows(run / "metrics.jsonl")[0]["grad_norm"] > 0 and rows(run / "metrics.jsonl")[1]["kl"] > 0
    resolved, _ = plan_run(settings[0], [f"model.path={flow}", "sampler.steps=null", "name=other"])
    assert (resolved.sampler.steps, resolved.sampler.guidance_scale) == (28, 4.0)  # the family's

    # its shift depends on the image size, and the picture is that of the stock scheduler
    model = build.build_model(resolved.model, CPU, trainable=False)
    for height, width in ((32, 32), (64, 32)):
        resolved.sampler.height, resolved.sampler.width = height, width
        shape = model.latent_shape(height, width)
        prompts = ["a cat", "a dog on a blue background"]  # of different lengths
        start = normal(2, *shape).float()
        with torch.no_grad():
            found = build.build_sampler(model, resolved.sampler).sample(model.encode(prompts), Rollout(start)).latents
            expected = stock(flow, model, prompts, start, shape)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def stock(directory: Path, model: Any, prompts: list[str], x: torch.Tensor, shape: tuple[int, int, int]) -> Any:
    """The stock scheduler's steps with the stock network, each prompt by itself, without padding."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")
    sigmas = torch.linspace(1, 1 / 28, 28).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=0.5 + shape[1] * shape[2] / 1024)
    unet = UNet2DConditionModel.from_pretrained(directory / "unet").eval()
    hidden = [model.encode([prompt]).hidden for prompt in prompts]
    without = model.encode([""]).hidden
    assert hidden[0].shape != hidden[1].shape
    for t in scheduler.timesteps:
        u, c = (
            torch.cat([unet(x[i : i + 1], t, text[i]).sample for i in range(len(x))])
            for text in ([without] * len(x), hidden)
        )
        x = scheduler.step(u + 4.0 * (c - u), t, x).prev_sample
    return x


def walk() -> list[tuple[str, str]]:
    """File and function of each station."""
    section = PAGE.partition("## The way of a prompt")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`: `(\w+)`", section, re.MULTILINE)


def test_the_way_of_a_prompt(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each station is entered for the first time after the one before it."""
    stations, root = walk(), str(ROOT / "src" / "draftplus") + "/"
    assert len(stations) > 15
    entered: list[tuple[str, str]] = []
    seen: set[tuple[str, str]] = set()
    wanted = set(stations)

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            at = (frame.f_code.co_filename.removeprefix(root), frame.f_code.co_name)
            if at in wanted and at not in seen and not evaluating:
                seen.add(at)
                entered.append(at)

    evaluating: list[int] = []
    held_out = importlib.import_module("draftplus.training.fine_tuning").evaluate_held_out

    def evaluate(*args: Any) -> Any:
        evaluating.append(1)
        try:
            return held_out(*args)
        finally:
            evaluating.pop()

    from draftplus import cli

    monkeypatch.setattr("draftplus.training.fine_tuning.evaluate_held_out", evaluate)
    monkeypatch.setattr("draftplus.api.write_report", lambda run: None)
    more = ["train.steps=1", "objective.kl_coeff=1", "reward=emoji_clip", "device=cpu"]
    monkeypatch.setattr("sys.argv", ["draftplus", "train", *settings, *more])
    sys.setprofile(trace)
    try:
        cli.main()
    finally:
        sys.setprofile(None)
    assert entered == stations
