"""What training exports loads in the stock pipeline of its family, and what its scripts write loads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from torch import Tensor

from draftplus import api
from draftplus.config import LoraConfig
from draftplus.errors import UserError
from tests.families.cases import PROMPTS, Case, load_model, stock_picture, stock_pipe
from tests.families.conftest import Below, Saved
from tests.tiny import randomize

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SEED, STEPS = 5, 3


def ours(case: Case, directory: Path, adapter: Path | None = None) -> Tensor:
    overrides = case.overrides(case.sizes[1], STEPS, case.guided)
    return api.generate(str(directory), [PROMPTS[0]], [SEED], overrides, adapter)


def theirs(case: Case, pipe: Any) -> Tensor:
    return stock_picture(pipe, PROMPTS[0], SEED, **case.call(case.sizes[1], STEPS, case.guided))


@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_the_stock_pipeline_loads_the_adapter(
    case: Case, directory: Path, tmp_path: Path, targets: str, below: Below
) -> None:
    model = load_model(directory, torch.float32, lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
    randomize(model, size=0.2)
    model.tuned.save(tmp_path)
    pipe = stock_pipe(directory)
    pipe.load_lora_weights(tmp_path)
    picture = ours(case, directory, tmp_path)
    below("LoRA out", (picture - theirs(case, pipe)).abs().max(), 1e-3)
    assert (picture - ours(case, directory)).abs().max() > 1e-2


def test_the_stock_pipeline_takes_the_full_weights(case: Case, directory: Path, tmp_path: Path, below: Below) -> None:
    model = load_model(directory, torch.float32, lora=None)
    randomize(model, size=0.3)
    model.tuned.save(tmp_path)
    pipe = stock_pipe(directory)
    component = model.kind.component
    setattr(pipe, component, type(model.tuned.denoiser).from_pretrained(tmp_path))
    picture = ours(case, directory, tmp_path)
    below("full weights out", (picture - theirs(case, pipe)).abs().max(), 1e-3)
    assert (picture - ours(case, directory)).abs().max() > 1e-2


def test_a_file_of_the_stock_scripts_loads_here(case: Case, directory: Path, tmp_path: Path, below: Below) -> None:
    """Written by the pipeline's `save_lora_weights`, with its alpha in the header, as diffusers' scripts do."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe = stock_pipe(directory)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, component)
    names = load_model(directory, torch.float32).tuned.state()
    targets = sorted({name.removeprefix(f"{component}.").partition(".lora_")[0] for name in names})
    peft = PeftConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        denoiser.add_adapter(peft)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(denoiser)}
    type(pipe).save_lora_weights(tmp_path, **layers, **_collate_lora_metadata({component: denoiser}))
    pipe = stock_pipe(directory)
    pipe.load_lora_weights(tmp_path)
    picture = ours(case, directory, tmp_path)
    below("LoRA in", (picture - theirs(case, pipe)).abs().max(), 1e-3)
    assert (picture - ours(case, directory)).abs().max() > 1e-2


def test_an_adapter_of_another_family(name: str, directory: Path, saved: Saved, tmp_path: Path) -> None:
    other = "sd3" if name == "sdxl" else "sdxl"
    model = load_model(saved(other), torch.float32)
    randomize(model)
    model.tuned.save(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)) as told:
        load_model(directory, torch.float32, trainable=False).tuned.load(tmp_path)
    assert len(str(told.value).splitlines()) == 1
