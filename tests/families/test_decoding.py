"""Decoding in slices and in tiles: the stock autoencoder's pictures and its gradients, in float64."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftplus import api
from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models.kind import spare_memory
from draftplus.models.stable_diffusion import StableDiffusion
from tests.families.cases import PROMPTS, Case, load_model, stock_picture, stock_pipe
from tests.tiny import normal, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = ["sdxl", "sd3", "flux2_klein_base", "qwen_image"]  # the others' autoencoders are of the second one's class
TILED = {"vae_tiling": True}
WAYS: list[dict[str, bool]] = [
    {"vae_slicing": True}, TILED, {**TILED, "vae_slicing": True, "gradient_checkpointing": True}
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one class whose tiles are not as large as its configuration says: 256 pixels."""
    from diffusers import AutoencoderKLQwenImage as Qwen

    monkeypatch.setattr(Qwen, "enable_tiling", partialmethod(Qwen.enable_tiling, 64, 64, 48, 48))


def stock_decoded(vae: Any, latents: Tensor) -> Tensor:
    """(b, 3, H, W) in [0, 1]. latents: as the autoencoder takes them."""
    video = type(vae).__name__ == "AutoencoderKLQwenImage"
    image = vae.decode(latents.unsqueeze(2) if video else latents, return_dict=False)[0]
    return ((image.squeeze(2) if video else image) / 2 + 0.5).clamp(0, 1)


def check_gradients(model: Any, to_vae: Any, vae: Any, shape: tuple[int, ...], way: dict[str, bool]) -> None:
    """Those of `decode` against autograd through the stock autoencoder, and against differences along one direction."""
    if "vae_slicing" in way:
        vae.enable_slicing()
    z, direction = normal(2, *shape, seed=1), normal(2, *shape, seed=2)
    weight = normal(*model.decode(z).shape, seed=3)
    (whole,) = torch.autograd.grad((stock_decoded(vae, to_vae(x := z.clone().requires_grad_())) * weight).sum(), x)
    if "vae_tiling" in way:
        vae.enable_tiling()
    theirs = stock_decoded(vae, to_vae(x := z.clone().requires_grad_()))
    ours = model.decode(y := z.clone().requires_grad_())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
    (found,) = torch.autograd.grad((ours * weight).sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.allclose(found, whole, rtol=1e-9, atol=1e-10) != ("vae_tiling" in way)
    # one of them goes through float32, whatever its weights are in
    size, close = (1e-4, 5e-3) if type(vae).__name__ == "AutoencoderKLQwenImage" else (1e-6, 1e-5)
    with torch.no_grad():
        further, back = (model.decode(z + sign * size * direction) for sign in (1, -1))
    slope = ((further - back) * weight).sum().item() / (2 * size)
    assert (found * direction).sum().item() == pytest.approx(slope, rel=close)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(case: Case, directory: Path, way: dict[str, bool]) -> None:
    model = load_model(directory, trainable=False, **way)
    pipe = stock_pipe(directory, torch.float64)
    shape = model.latent_shape(*case.sizes[1])
    check_gradients(model, lambda z: model.kind.to_vae(pipe, z), pipe.vae, shape, way)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_gradients_of_stable_diffusion(tiny_path: Path, way: dict[str, bool]) -> None:
    model: StableDiffusion = tiny_model(tiny_path, trainable=False, **way)
    vae = stock_pipeline(tiny_path).vae
    check_gradients(model, lambda z: z / vae.config.scaling_factor, vae, (4, 12, 10), way)


@pytest.mark.parametrize("name", ["sdxl", "qwen_image"])
def test_pictures(case: Case, directory: Path) -> None:
    """`generate` draws the stock pipeline's with the same settings, and others than without."""
    setting, pipe = (case.sizes[1], 3, case.guided), stock_pipe(directory)
    whole = stock_picture(pipe, PROMPTS[0], 5, **case.call(*setting))
    pipe.vae.enable_tiling()
    theirs = stock_picture(pipe, PROMPTS[0], 5, **case.call(*setting))
    overrides = [*case.overrides(*setting), "model.vae_tiling=true", "model.vae_slicing=true"]
    ours = api.generate(str(directory), [PROMPTS[0]], [5], overrides)
    assert (ours - theirs).abs().max() < 1e-3 < (whole - theirs).abs().max()


@pytest.mark.parametrize("way", ["slicing", "tiling"])
def test_a_class_that_cannot(way: str) -> None:
    from diffusers import AutoencoderKLTemporalDecoder

    vae = AutoencoderKLTemporalDecoder(block_out_channels=(32,), layers_per_block=1)
    with pytest.raises(UserError, match=f"model.vae_{way} is true, but AutoencoderKLTemporalDecoder .* has no {way}"):
        spare_memory(vae, ModelConfig(**{f"vae_{way}": True}))
