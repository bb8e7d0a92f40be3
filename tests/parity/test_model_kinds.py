"""Directories that differ from the usual Stable Diffusion in one thing: our picture is the stock pipeline's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from draftplus import api, errors
from draftplus.errors import UserError
from tests.tiny import stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning:diffusers.*")
STEPS = 3


@pytest.fixture(autouse=True)
def _notices_are_new() -> None:
    errors.notice.cache_clear()


def edited(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a model with some keys of a JSON file changed; those that are None are left out."""
    shutil.copytree(source, target)
    config = {**json.loads((target / file).read_text()), **changes}
    (target / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


def ours(directory: Path, prompt: str = "a cat", scale: float = 4.0, **sampler: Any) -> Tensor:
    given = {"steps": STEPS, "guidance_scale": scale, **sampler}
    overrides = ["device=cpu", *(f"sampler.{key}={value}" for key, value in given.items())]
    return api.generate(str(directory), [prompt], [5], overrides)


def stock(directory: Path, prompt: str = "a cat", scale: float = 4.0, **sampler: Any) -> Tensor:
    """(1, 3, H, W) of the directory's own pipeline, with the DDIM scheduler of its configuration."""
    pipe = stock_pipeline(directory, torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    images = pipe(
        prompt, num_inference_steps=STEPS, guidance_scale=scale, generator=torch.Generator("cpu").manual_seed(5),
        output_type="np", **sampler,
    ).images  # fmt: skip
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_same(directory: Path, prompt: str = "a cat", scale: float = 4.0, **sampler: Any) -> None:
    found, expected = ours(directory, prompt, scale, **sampler), stock(directory, prompt, scale, **sampler)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_legacy_sample_size_means_64(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = edited(tiny_path, tmp_path / "m", "unet/config.json", _diffusers_version="0.6.0", sample_size=32)
    assert tiny_model(old, trainable=False).latent_shape() == (4, 64, 64)
    assert "says sample_size 32; 64 is used instead" in capsys.readouterr().err
    assert_same(old)


@pytest.mark.parametrize(("version", "size"), [("0.9.0", 8), ("0.6.0", [8, 12]), ("0.6.0", 72), (None, 8)])
def test_other_sample_sizes_stay(tiny_path: Path, tmp_path: Path, version: str | None, size: Any) -> None:
    given = edited(tiny_path, tmp_path / "m", "unet/config.json", _diffusers_version=version, sample_size=size)
    expected = [size, size] if isinstance(size, int) else size
    assert tiny_model(given, trainable=False).latent_shape() == (4, *expected)
    if max(expected) < 64:
        assert_same(given)


@pytest.fixture(scope="module")
def lcm(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guidance-distilled UNet, as latent consistency models have."""
    directory = tmp_path_factory.mktemp("lcm") / "model"
    shutil.copytree(tiny_path, directory)
    plain = UNet2DConditionModel.from_pretrained(tiny_path / "unet")
    torch.manual_seed(0)
    made = UNet2DConditionModel.from_config({**plain.config, "time_cond_proj_dim": 9})
    made.load_state_dict(plain.state_dict(), strict=False)
    made.time_embedding.cond_proj.weight.data.normal_()
    made.save_pretrained(directory / "unet")
    return directory


@pytest.mark.parametrize("scale", [1.0, 4.0, 8.5])
def test_a_consistency_unet_is_told_the_guidance_scale(lcm: Path, scale: float) -> None:
    assert_same(lcm, scale=scale)


def test_its_guidance_scale_matters(lcm: Path) -> None:
    assert not torch.allclose(ours(lcm, scale=4.0), ours(lcm, scale=8.5), atol=1e-2)


def test_a_consistency_scheduler_is_refused_by_name(lcm: Path, tmp_path: Path) -> None:
    given = edited(lcm, tmp_path / "m", "scheduler/scheduler_config.json", _class_name="LCMScheduler")
    with pytest.raises(UserError, match=r"scheduler is LCMScheduler, which is not supported.*sampler\.solver=ddim"):
        ours(given)
    assert torch.equal(ours(given, solver="ddim"), ours(lcm))


def test_textual_inversion_of_several_vectors(tiny_path: Path, tmp_path: Path) -> None:
    pipe = stock_pipeline(tiny_path, torch.float32)
    for token, count in (("<v>", 3), ("<one>", 1), ("plainword", 2)):
        vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(count))
        pipe.load_textual_inversion({token: vectors}, token=token)
    pipe.save_pretrained(tmp_path / "m")
    made, pipe = tiny_model(tmp_path / "m", trainable=False), stock_pipeline(tmp_path / "m")
    for prompt in ("a <v> cat", "<v>", "a <one> and a <v>", "plainword dog", "a cat", ""):
        expected, _ = pipe.encode_prompt([prompt], "cpu", 1, False)
        assert torch.equal(made.encode([prompt]).hidden, expected), prompt
    assert_same(tmp_path / "m", "a <v> cat", negative_prompt="a <one>")


def test_a_long_prompt_is_cut_as_in_stock_and_said_once(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, pipe = tiny_model(tiny_path, trainable=False), stock_pipeline(tiny_path)
    longs = ["a " + "very " * 40 + animal for animal in ("cat", "dog")]
    expected, _ = pipe.encode_prompt(longs, "cpu", 1, False)
    capsys.readouterr()
    assert torch.equal(made.encode(["a cat", *longs]).hidden[1:], expected)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a prompt has 84 tokens, and the text encoder reads the first 16" in said


def test_no_sample_size(tiny_path: Path, tmp_path: Path) -> None:
    given = edited(tiny_path, tmp_path / "m", "unet/config.json", sample_size=None)
    assert_same(given, height=16, width=24)
    with pytest.raises(UserError, match=r"sampler.height is null.*set sampler.height and sampler.width"):
        ours(given)
    with pytest.raises(UserError, match=r"sampler\.width is null"):
        ours(given, height=16)


def test_a_vae_without_quantisation_convolutions(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    plain = AutoencoderKL.from_pretrained(tiny_path / "vae")
    made = AutoencoderKL.from_config({**plain.config, "use_quant_conv": False, "use_post_quant_conv": False})
    made.load_state_dict({k: v for k, v in plain.state_dict().items() if "quant_conv" not in k})
    shutil.rmtree(tmp_path / "m/vae")
    made.save_pretrained(tmp_path / "m/vae")
    assert_same(tmp_path / "m")


def test_a_tokenizer_without_a_maximal_length(tiny_path: Path, tmp_path: Path) -> None:
    given = edited(tiny_path, tmp_path / "m", "tokenizer/tokenizer_config.json", model_max_length=None)
    assert torch.equal(ours(given, "a " + "very " * 40 + "cat"), ours(tiny_path, "a " + "very " * 40 + "cat"))
