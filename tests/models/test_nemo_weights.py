"""UNets and autoencoders in NeMo's files, in the layouts that its scripts read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from draftplus import api
from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models.nemo import as_original
from draftplus.models.stable_diffusion import StableDiffusion, load
from tests.support.ldm import unet_as_ldm, vae_as_ldm
from tests.support.nemo import unet_as_nemo, write_nemo
from tests.tiny import CPU, normal, save_tiny, tiny_model

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
    "in a whole model": lambda state: {
        **unet_as_nemo(state),
        "model.first_stage_model.x": torch.ones(2),
        "init_model.model.diffusion_model.input_blocks.0.0.weight": torch.ones(2),
    },
}


@pytest.mark.parametrize("layout", UNETS)
def test_a_unets_names(other: Path, layout: str) -> None:
    original = unet_as_ldm(stored(other, "unet"))
    given = UNETS[layout](original)
    found = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in as_original(given).items()}
    assert given.keys() != original.keys()
    for name, tensor in original.items():
        assert found[name.removeprefix("model.diffusion_model.")] is tensor


@pytest.mark.parametrize("layout", ["of NeMo", "alone", "in a whole model"])
def test_a_unet(tiny_path: Path, other: Path, tmp_path: Path, layout: str) -> None:
    wanted = stored(other, "unet")
    found = loaded(tiny_path, tmp_path / "unet.ckpt", UNETS[layout](unet_as_ldm(wanted)), denoiser="").unet.state_dict()
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


def adapter(tiny_path: Path, file: Path, alpha: float | None) -> dict[str, Tensor]:
    """Writes an adapter of NeMo with random weights. Returns what it adds to each layer of the UNet."""
    draw, named, added = torch.Generator().manual_seed(2), {}, {}
    for name, tensor in stored(tiny_path, "unet").items():
        layer = name.removesuffix(".weight")
        if layer.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down, up = torch.randn(2, tensor.shape[1], generator=draw), torch.randn(tensor.shape[0], 2, generator=draw)
            own = f"{layer}.adapter_layer.parallel_linear_adapter"
            named |= {f"{own}.linear_in.weight": down, f"{own}.linear_out.weight": up}
            added[name] = up @ down * (alpha / 2 if alpha else 1)
    config = {"peft": {"peft_scheme": "sdlora", "lora_tuning": {"adapter_dim": 2, "network_alpha": alpha}}}
    write_nemo(file, config, {"model_weights.ckpt": unet_as_nemo(unet_as_ldm(named))})
    return added


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_an_adapter(tiny_path: Path, tmp_path: Path, alpha: float | None) -> None:
    """It does to the UNet what the products of its matrices do, added to its weights."""
    added = adapter(tiny_path, tmp_path / "adapter.nemo", alpha)
    model, wanted = (tiny_model(tiny_path, trainable=False) for _ in range(2))
    assert len(added) == 4 * 8  # four blocks with attention to itself and to the prompt, of four layers each
    for name, tensor in added.items():
        wanted.unet.get_parameter(name).data += tensor.double()
    model.tuned.load(tmp_path / "adapter.nemo")
    given = normal(1, 4, 8, 8), torch.tensor([500]), normal(1, 3, 8, seed=1)
    with torch.no_grad():
        found, base = model.unet(*given).sample, tiny_model(tiny_path, trainable=False).unet(*given).sample
        assert torch.allclose(found, wanted.unet(*given).sample, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, base, atol=1e-2)


def test_what_is_in_a_nemo_file_goes_where_it_belongs(tiny_path: Path, other: Path, tmp_path: Path) -> None:
    """A tuned UNet is a denoiser, an adapter an adapter, and neither is a whole model."""
    adapter(tiny_path, tmp_path / "adapter.nemo", None)
    whole = unet_as_nemo(unet_as_ldm(stored(other, "unet")))
    write_nemo(tmp_path / "unet.nemo", {"peft": {"peft_scheme": "none"}}, {"model_weights.ckpt": whole})
    given = {"path": str(tiny_path), "denoiser": str(tmp_path / "unet.nemo")}
    model = load(ModelConfig(**given), str(tiny_path), CPU, trainable=False, dtype=torch.float64)
    assert all(torch.equal(model.unet.state_dict()[name], t) for name, t in stored(other, "unet").items())
    with pytest.raises(UserError, match=r"unet.nemo: .* is not a part of an adapter .*model.denoiser"):
        model.tuned.load(tmp_path / "unet.nemo")
    with pytest.raises(UserError, match="do not fit, which are an adapter's"):
        load(ModelConfig(**{**given, "denoiser": str(tmp_path / "adapter.nemo")}), str(tiny_path), CPU)
    with pytest.raises(UserError, match=r"adapter.nemo'.*model.denoiser.*--adapter"):
        api.load_model(str(tmp_path / "adapter.nemo"))
    parts = {f"mp_rank_0{i}/model_weights.ckpt": whole for i in range(2)}
    write_nemo(tmp_path / "unet.nemo", {}, parts)
    with pytest.raises(UserError, match="divided among 2 processes"):
        load(ModelConfig(**given), str(tiny_path), CPU)
