"""UNets and autoencoders in NeMo's files, in the layouts that its scripts read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from draftplus.config import ModelConfig
from draftplus.models.nemo import as_original
from draftplus.models.stable_diffusion import StableDiffusion, load
from tests.support.ldm import unet_as_ldm, vae_as_ldm
from tests.support.nemo import unet_as_nemo
from tests.tiny import CPU, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model whose parts take the place of the tiny one's."""
    return save_tiny(tmp_path_factory.mktemp("other"), seed=5)


def stored(other: Path, part: str) -> dict[str, Tensor]:
    return load_file(other / part / "diffusion_pytorch_model.safetensors")


def loaded(tiny_path: Path, file: Path, content: Any, **keys: str) -> StableDiffusion:
    torch.save(content, file)
    settings: dict[str, Any] = {key: str(file) for key in keys}
    return load(ModelConfig(path=str(tiny_path), **settings), str(tiny_path), CPU, trainable=False, dtype=torch.float64)


UNETS = {
    "of NeMo": lambda state: unet_as_nemo(state),
    "alone": lambda state: unet_as_nemo(state, ""),
    "in a model": lambda state: unet_as_nemo(state, "model.diffusion_model."),
    "compiled": lambda state: unet_as_nemo(state, "model.model._orig_mod.diffusion_model."),
    "compiled inside": lambda state: unet_as_nemo(state, "model.model.diffusion_model._orig_mod."),
    "original names": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "in a whole model": lambda state: {**unet_as_nemo(state), "model.first_stage_model.x": torch.ones(2)},
}


@pytest.mark.parametrize("layout", UNETS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_unet(tiny_path: Path, other: Path, tmp_path: Path, layout: str, nested: bool) -> None:
    wanted = stored(other, "unet")
    state = UNETS[layout](unet_as_ldm(wanted))
    model = loaded(tiny_path, tmp_path / "unet.ckpt", {"state_dict": state} if nested else state, denoiser="")
    found = model.unet.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_of_training(tiny_path: Path, other: Path, tmp_path: Path) -> None:
    """The configuration lies in it as an object, which is read past."""
    config = OmegaConf.create({"lr": [1e-4, None, "x"], "model": {"lr": "${lr}", "on": True}})
    content = {"state_dict": unet_as_nemo(unet_as_ldm(stored(other, "unet"))), "hyper_parameters": {"cfg": config}}
    found = loaded(tiny_path, tmp_path / "last.ckpt", content, denoiser="").unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored(other, "unet").items())


@pytest.mark.parametrize("layout", ["diffusers", "of NeMo", "in a model", "in a module"])
def test_an_autoencoder(tiny_path: Path, other: Path, tmp_path: Path, layout: str) -> None:
    wanted = stored(other, "vae")
    state = vae_as_ldm(wanted)
    prefix = {"of NeMo": "", "in a model": "first_stage_model.", "in a module": "model.first_stage_model."}
    content = wanted if layout == "diffusers" else {
        name.replace("first_stage_model.", prefix[layout], 1): tensor for name, tensor in state.items()
    }  # fmt: skip
    found = loaded(tiny_path, tmp_path / "vae.bin", content, vae="").vae.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_other_layouts_keep_their_names(other: Path) -> None:
    for state in (stored(other, "unet"), unet_as_ldm(stored(other, "unet")), vae_as_ldm(stored(other, "vae"))):
        assert as_original(state).keys() == state.keys()
