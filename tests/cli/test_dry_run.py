"""--dry-run says what a run would do, and writes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from draftplus.build import build_model
from tests.support.runs import configure
from tests.tiny import CPU

TRAJECTORY = ["objective.kl_steps=trajectory", "objective.kl_coeff=0.1"]
# settings, and the passes without gradient, with it, and of the frozen model, for 3 sampling steps
PASSES = {
    "draft": ([], (2, 1, 0)),
    "draft+": (["objective.kl_coeff=0.1"], (2, 1, 1)),
    "draft-2": (["objective.grad_steps=2", "objective.kl_coeff=0.1"], (1, 2, 2)),
    "draft_lv": (["objective.method=draft_lv", "objective.kl_coeff=0.1"], (2, 3, 3)),
    "trajectory": ([*TRAJECTORY, "objective.kl_draws=2"], (2, 3, 3)),
    "prefix alone": (["objective.kl_steps=trajectory", "objective.kl_prefix_coeff=1"], (2, 2, 1)),
    "draft_lv on the trajectory": (["objective.method=draft_lv", *TRAJECTORY], (2, 4, 4)),
    "gate": (["objective.gate=0.34", "objective.grad_steps=all", "objective.kl_coeff=0.1"], (1, 2, 2)),
    "gate on the trajectory": (["objective.gate=0.67", *TRAJECTORY, "objective.kl_draws=2"], (2, 3, 3)),
    "ddpo after a gate": (["objective.method=ddpo", "objective.gate=0.34", *TRAJECTORY], (3, 3, 3)),
    "ddpo": (["objective.method=ddpo", "objective.ddpo.inner_epochs=2"], (3, 6, 0)),
}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass of the denoiser that is made from now on has gradient."""
    from draftplus.models.stable_diffusion import StableDiffusion

    calls: list[bool] = []
    predict = StableDiffusion.predict

    def counting(self: Any, latents: Any, *rest: Any) -> Any:
        import torch

        calls.append(torch.is_grad_enabled())
        assert len(latents) == 2 * 4, "guidance in one call"
        return predict(self, latents, *rest)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    return calls


@pytest.mark.parametrize("case", PASSES)
def test_what_it_says(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path, case: str) -> None:
    overrides, (without, graded, frozen) = PASSES[case]
    before = sorted(tmp_path.rglob("*"))
    printed = draftplus("train", *settings, *overrides, "--dry-run")
    assert (printed.code, printed.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    config = configure([*settings, *overrides])
    resolved, told = printed.out.split("\n\n", 1)
    assert OmegaConf.create(resolved).optim.lr == config.optim.lr
    count = sum(p.numel() for p in build_model(config.model, CPU).tuned.trainable().values())
    assert re.search(rf"trained parameters +{count:,}\n", told)
    assert re.search(r"prompts +18 to train on, 2 held out", told)
    assert f"{without} without gradient, {graded} with gradient, {frozen} of the frozen model" in told
    assert re.search(r"expected time +\d+ min \d+ s: 4 steps of \d+\.\d s, 2 evaluations of 4 images", told)


@pytest.mark.parametrize("case", [case for case in PASSES if not case.startswith("ddpo")])
def test_passes_are_those_that_training_makes(
    draftplus: Callable[..., Any], settings: list[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Counted at the denoiser, for one step's images."""
    calls = counted(monkeypatch)
    draftplus("train", *settings, *PASSES[case][0], "--dry-run")
    without, graded, frozen = PASSES[case][1]
    assert (calls.count(False), calls.count(True)) == (without + frozen, graded)


def test_a_gate_and_its_cache(
    draftplus: Callable[..., Any], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = [*settings, "objective.gate=0.67", "--dry-run"]
    assert "gate   " not in draftplus("train", *settings, "--dry-run").out
    told = r"gate +the frozen model draws the first 2 of 3 steps"
    assert re.search(told + "\n", draftplus("train", *gate).out)
    calls = counted(monkeypatch)
    told += ", once for 3 uses of a start noise: 0 passes without gradient at the others\n"
    assert re.search(told, draftplus("train", *gate, "train.prefix_cache.uses=3").out)
    assert calls == [False, False, True, True], "the second step of the time that is told draws no prefix"
