"""The lines that a card gives for stock diffusers let the base model draw the steps before the gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.config import LoraConfig
from draftplus.models.lora_files import LORA_FILE
from draftplus.publish.usage import elsewhere, snippet
from draftplus.runs.weights import find_weights
from tests.families.cases import PROMPTS, load_model
from tests.families.conftest import Saved
from tests.families.test_snippets import SMALL
from tests.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def exact(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The picture of the lines, (3, H, W), not rounded to 8 bits."""
    told: dict[str, object] = {}
    monkeypatch.chdir(directory)
    assert "image = pipeline(\n" in code
    exec(code.replace("image = pipeline(\n", 'image = pipeline(\n    output_type="pt",\n'), told)
    picture = told["image"]
    assert isinstance(picture, torch.Tensor)
    return picture.float()


GATED = {
    "sd": ["sampler.steps=4"],
    "sdxl": ["sampler.steps=4", "sampler.solver=dpmpp_2m"],
    "sd3": ["sampler.steps=4"],
    "flux_dev": ["sampler.sigmas=[0.9,0.7,0.55,0.2]"],
    "chroma": ["sampler.steps=4"],
    "flux2_klein_base": ["sampler.steps=4"],
    "qwen_image": ["sampler.steps=4", "sampler.negative_prompt=' '"],
    "zimage": ["sampler.steps=4"],
}


@pytest.mark.parametrize(("name", "whole"), [*((name, False) for name in GATED), ("sd", True), ("sd3", True)])
def test_they_follow_a_gate(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, whole: bool
) -> None:
    directory = saved(name)
    model = load_model(directory, torch.float32, lora=None if whole else LoraConfig(rank=3, alpha=6.0))
    randomize(model, size=0.3)
    model.tuned.gate = 0.5
    model.tuned.save(tmp_path)
    (tmp_path / directory.name).symlink_to(directory)
    overrides = [*SMALL, *GATED[name]]
    config = find_weights(str(directory), [*overrides, *(["model.lora=null"] if whole else [])]).config
    config.objective.gate = 0.5
    code = snippet(config, "diffusers", not whole, LORA_FILE, None, PROMPTS[0])
    assert "# the base model draws the first 2 steps of 4;" in code
    ours = api.generate(str(directory), [PROMPTS[0]], [0], overrides, tmp_path)[0]
    assert (exact(code, tmp_path, monkeypatch) - ours).abs().max() < 1e-3
    without = code.replace("    callback_on_step_end=switch,\n", "")
    assert (exact(without, tmp_path, monkeypatch) - ours).abs().max() > 1e-2  # the base model alone
    config.objective.gate = 0.0
    plain = snippet(config, "diffusers", not whole, LORA_FILE, None, PROMPTS[0])
    assert (exact(plain, tmp_path, monkeypatch) - ours).abs().max() > 1e-2  # what was tuned alone


def test_a_gate_for_other_programs(saved: Saved) -> None:
    config = find_weights(str(saved("sdxl")), [*SMALL, "sampler.steps=4"]).config
    assert "gate" not in elsewhere(config, "kohya", True, "x.safetensors")
    config.objective.gate = 0.25
    assert "`end_at_step` 1 and" in elsewhere(config, "kohya", True, "x.safetensors")
    assert "the merged weights draw all 4 steps, and other" in elsewhere(config, "merged", True, "x.safetensors")
    assert "switch" not in snippet(config, "merged", True, "x.safetensors", None, "x")
    assert "the first step of 4;" in snippet(config, "kohya", True, "x.safetensors", None, "x")
