"""The lines that a card gives for stock diffusers draw the run's picture, with the sigmas that it samples with."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import numpy
import pytest
import torch

from draftplus import api
from draftplus.config import LoraConfig
from draftplus.models.families import FAMILIES
from draftplus.models.lora_files import LORA_FILE
from draftplus.publish.usage import elsewhere, snippet
from draftplus.runs.weights import find_weights
from tests.families.cases import PROMPTS, load_model
from tests.families.conftest import Saved
from tests.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SMALL = ["device=cpu", "sampler.height=64", "sampler.width=64", "sampler.guidance_scale=3"]
SAMPLED = {
    "sd": [[], ["sampler.spacing=trailing", "sampler.solver=euler"]],
    "sdxl": [
        [],
        ["sampler.solver=ddim", "sampler.negative_prompt="],
        ["sampler.spacing=trailing"],
        ["model.vae_tiling=true", "sampler.height=96"],
    ],
    "sd3": [["sampler.spacing=linear"], ["sampler.sigmas=[0.9,0.55,0.2]"], ["sampler.negative_prompt=grey"]],
    "sd3_without_t5": [[]],
    "flux_dev": [["sampler.sigmas=[0.9,0.55,0.2]"]],
    "flux2_klein_base": [["sampler.sigmas=[0.9,0.55,0.2]"]],
    "qwen_image": [["sampler.sigmas=[0.9,0.55,0.2]", "sampler.negative_prompt=' '"]],
    "zimage": [["sampler.sigmas=[0.9,0.55,0.2]"], ["sampler.spacing=linear"]],
}


def drawn(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Runs the lines beside the exported files. Returns their picture, (3, H, W) in [0, 1]."""
    told: dict[str, object] = {}
    monkeypatch.chdir(directory)
    exec(code, told)
    return torch.from_numpy(numpy.asarray(told["image"])).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("name", "settings"), [(name, one) for name, many in SAMPLED.items() for one in many], ids=str)
def test_they_draw_our_picture(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: list[str]
) -> None:
    directory = saved(name)
    model = load_model(directory, torch.float32, lora=LoraConfig(rank=3, alpha=6.0))
    randomize(model, size=0.3)
    model.tuned.save(tmp_path)
    (tmp_path / directory.name).symlink_to(directory)
    steps = [] if "sigmas" in "".join(settings) else ["sampler.steps=3"]
    overrides = [*SMALL, *steps, *settings]
    config = find_weights(str(directory), overrides).config
    code = snippet(config, "diffusers", True, LORA_FILE, None, PROMPTS[0])
    found = drawn(code, tmp_path, monkeypatch)
    ours = api.generate(str(directory), [PROMPTS[0]], [0], overrides, tmp_path)[0]
    assert (found - ours).abs().max() < 2 / 255
    if "sigmas" in "".join(settings) or (name == "sd3" and "sampler.spacing=linear" in settings):
        without = "\n".join(line for line in code.splitlines() if "sigmas=" not in line)
        assert (drawn(without, tmp_path, monkeypatch) - ours).abs().max() > 1e-2


def test_half_precision_and_full_tuning(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved("sd3")
    (tmp_path / directory.name).symlink_to(directory)
    model = load_model(directory, torch.float32, lora=None)
    randomize(model, size=0.3)
    model.tuned.save(tmp_path)
    overrides = [*SMALL, "sampler.steps=3", "sampler.spacing=linear"]
    config = find_weights(str(directory), [*overrides, "model.lora=null"]).config
    code = snippet(config, "diffusers", False, LORA_FILE, None, PROMPTS[0])
    ours = api.generate(str(directory), [PROMPTS[0]], [0], overrides, tmp_path)[0]
    assert (drawn(code, tmp_path, monkeypatch) - ours).abs().max() < 2 / 255
    half = find_weights(str(directory), [*overrides, "model.dtype=bfloat16"]).config
    assert "(base, torch_dtype=torch.bfloat16)" in snippet(half, "diffusers", True, LORA_FILE, None, "x")
    assert "torch_dtype" not in snippet(half, "diffusers", False, LORA_FILE, None, "x")


def test_in_words_for_other_programs(saved: Saved) -> None:
    def of(name: str, *settings: str) -> str:
        steps = [] if "sigmas" in "".join(settings) else ["sampler.steps=4"]
        config = find_weights(str(saved(name)), [*SMALL, *steps, *settings]).config
        return elsewhere(config, "diffusers", True, LORA_FILE)

    assert "Sampler Euler, 4 steps, guidance 3.0, the model's own shift." in of("sd3")
    assert "the model's own shift of noise levels (sigmas) that fall evenly from 1 to 1/4, and 0 at the end." in of(
        "sd3", "sampler.spacing=linear"
    )
    assert "of the noise levels (sigmas) 0.9, 0.5, and 0 at the end." in of("sd3", "sampler.sigmas=[0.9,0.5]")
    assert "Sampler Euler, 4 steps, CFG scale 3.0." in of("sdxl")
    assert "Sampler DPM++ 2M, 4 steps, CFG scale 3.0." in of("sdxl", "sampler.solver=dpmpp_2m")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_table_of_families_says_of_stock(name: str) -> None:
    family, pipeline = FAMILIES[name], getattr(diffusers, name)
    assert family.component in inspect.signature(pipeline.__init__).parameters
    assert hasattr(getattr(diffusers, family.denoiser), "from_pretrained")
    assert {family.scale, "num_inference_steps", "sigmas"} <= inspect.signature(pipeline.__call__).parameters.keys()
