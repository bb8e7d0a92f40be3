"""Loading, conditioning and decoding of the Stable Diffusion family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from draftplus.config import ModelConfig, ObjectiveConfig
from draftplus.diffusion.objectives import loss, plan, prefix
from draftplus.errors import UserError
from draftplus.models import embeddings
from draftplus.models.stable_diffusion import load
from tests.support.ldm import unet_as_ldm
from tests.tiny import (
    CPU,
    PROMPTS,
    SHAPE,
    gradients,
    noise_source,
    normal,
    problem,
    save_tiny,
    stock_pipeline,
    tiny_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The `local_dir_use_symlinks`:UserWarning")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_frozen_weights_in_half_precision(tiny_path: Path, dtype: str, full: bool) -> None:
    config = ModelConfig(dtype=dtype, lora=None) if full else ModelConfig(dtype=dtype)
    made = load(config, str(tiny_path), CPU)
    frozen = getattr(torch, dtype)
    decoder = torch.float32 if dtype == "float16" else frozen  # its configuration says force_upcast
    assert {p.dtype for p in made.vae.parameters()} == {decoder}
    assert {p.dtype for p in made.text_encoder.parameters()} == {frozen}
    assert {p.dtype for p in made.tuned.trainable().values()} == {torch.float32}
    kept = {p.dtype for p in made.unet.parameters() if not p.requires_grad}
    assert kept == (set() if full else {frozen})
    assert not any(p.requires_grad for part in (made.vae, made.text_encoder) for p in part.parameters())

    setting, noise = problem(made, ObjectiveConfig("draft", 2, kl_coeff=0.1)), noise_source(3)
    planned, conditioning = plan(setting.objective, setting.sampler.schedule, 0, 0), made.encode(PROMPTS)
    start = prefix(setting, conditioning, lambda *a: noise(*a).float(), planned)
    result = loss(setting, start, planned, conditioning, PROMPTS, noise)
    assert start.latents.dtype == result.images.dtype == result.value.dtype == torch.float32
    found = gradients(made.tuned.trainable(), result.value)
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in found.values())
    assert all(grad.abs().max() > 0 for name, grad in found.items() if "lora_A" not in name)


def test_a_model_for_sampling_has_nothing_to_train(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    assert made.tuned.trainable() == {}
    assert not made.decode(normal(1, *SHAPE)).requires_grad


def test_latent_shape(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    assert made.latent_shape() == (4, 8, 8)
    assert made.latent_shape(32, 24) == (4, 16, 12)
    assert made.latent_shape(width=20) == (4, 8, 10)
    for height, width, says in ((33, None, "sampler.height is 33"), (16, 17, "sampler.width is 17")):
        with pytest.raises(UserError, match=f"{says}; it must be a multiple of 2"):
            made.latent_shape(height, width)


def test_decode(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    vae = AutoencoderKL.from_pretrained(tiny_path / "vae", torch_dtype=torch.float64)
    x = (3 * normal(2, *SHAPE)).requires_grad_()
    images = made.decode(x)
    with torch.no_grad():
        expected = (vae.decode(x / vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images.detach(), expected)
    assert images.min() >= 0 and images.max() <= 1 and ((images == 0) | (images == 1)).any()
    (grad,) = torch.autograd.grad(images.sum(), x)
    assert grad.abs().max() > 0


def test_decode_shifts_back(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    config = json.loads((tmp_path / "m/vae/config.json").read_text())
    (tmp_path / "m/vae/config.json").write_text(json.dumps({**config, "shift_factor": 0.7}))
    plain, shifted = tiny_model(tiny_path, trainable=False), tiny_model(tmp_path / "m", trainable=False)
    x = normal(1, *SHAPE)
    torch.testing.assert_close(shifted.decode(x), plain.decode(x + 0.7 * 0.5))


def calls(made: Any) -> list[int]:
    """The batch sizes that the text encoder is called with."""
    seen: list[int] = []
    made.text_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_embeddings_are_the_stock_encoders(tiny_path: Path) -> None:
    made, texts = tiny_model(tiny_path, trainable=False), [*PROMPTS, "", "a " + "very " * 40 + "long cat"]
    given, _ = stock_pipeline(tiny_path).encode_prompt(texts, "cpu", 1, False)
    conditioning = made.encode(texts)
    assert torch.equal(conditioning.hidden, given)
    assert not conditioning.hidden.requires_grad and not conditioning.extras


def test_each_prompt_is_encoded_once(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    seen = calls(made)
    first = made.encode(["a cat", "a dog", "a cat", "a cat"]).hidden
    assert seen == [1, 1]
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    again = made.encode(["a dog", "a cat"]).hidden
    assert seen == [1, 1] and torch.equal(again, first[:2].flip(0))
    made.encode(["a dog", "a bee"])
    assert seen == [1, 1, 1]


def test_the_cache_is_bounded_and_changes_nothing(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a {word}" for word in "cat dog bee fox cow hen owl pig".split()]
    expected = tiny_model(tiny_path, trainable=False).encode(texts).hidden
    one = expected[0].nbytes
    monkeypatch.setattr(embeddings, "CACHE_BYTES", 3 * one)
    made = tiny_model(tiny_path, trainable=False)
    for _ in range(2):
        assert torch.equal(made.encode(texts).hidden, expected)
        assert len(made.encode._rows) == 3
        held = [tensor.untyped_storage().nbytes() for tensor in (row.hidden for row in made.encode._rows.values())]
        assert sum(held) == made.encode._bytes == 3 * one  # no entry keeps the batch that it came from
    seen = calls(made)
    made.encode(texts[-3:])
    assert seen == []
    made.encode([texts[5], texts[0]])  # 5 was used just now: 6 goes
    made.encode([texts[5], texts[7]])
    assert seen == [1]
    made.encode([texts[6]])
    assert seen == [1, 1]


def test_an_embedding_does_not_depend_on_its_batch(tiny_path: Path) -> None:
    together = tiny_model(tiny_path, trainable=False).encode(PROMPTS).hidden
    alone = tiny_model(tiny_path, trainable=False)
    assert torch.equal(together, torch.cat([alone.encode([prompt]).hidden for prompt in PROMPTS]))


def test_a_cache_too_small_for_one_prompt(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CACHE_BYTES", 1)
    made = tiny_model(tiny_path, trainable=False)
    assert made.encode(PROMPTS).hidden.shape == (3, 16, 8)
    assert len(made.encode._rows) == 1


def test_a_returned_embedding_is_not_the_cached_one(tiny_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    first = made.encode(["a cat"]).hidden
    kept = first.clone()
    first.zero_()
    assert torch.equal(made.encode(["a cat"]).hidden, kept)


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_tiny(tmp_path_factory.mktemp("other") / "model", seed=5)


@pytest.mark.parametrize("layout", ["directory", "diffusers", "ldm", "pickle"])
def test_a_replaced_denoiser(tiny_path: Path, other_path: Path, tmp_path: Path, layout: str) -> None:
    given = {"directory": other_path / "unet", "diffusers": other_path / UNET}.get(layout)
    if given is None:
        state = load_file(other_path / UNET)
        given = tmp_path / ("u.safetensors" if layout == "ldm" else "u.ckpt")
        if layout == "ldm":
            save_file(unet_as_ldm(state), given)
        else:
            torch.save({"state_dict": state}, given)
    made = tiny_model(tiny_path, denoiser=str(given), trainable=False)
    expected, base = tiny_model(other_path, trainable=False), tiny_model(tiny_path, trainable=False)
    assert equal(made.unet, expected.unet) and not equal(made.unet, base.unet)
    assert equal(made.vae, base.vae) and made.unet.conv_in.weight.dtype == torch.float64


@pytest.mark.parametrize("layout", ["directory", "diffusers"])
def test_a_replaced_autoencoder(tiny_path: Path, other_path: Path, layout: str) -> None:
    given = other_path / ("vae" if layout == "directory" else VAE)
    made = tiny_model(tiny_path, vae=str(given), trainable=False)
    expected, base = tiny_model(other_path, trainable=False), tiny_model(tiny_path, trainable=False)
    assert equal(made.vae, expected.vae) and equal(made.unet, base.unet)
    assert made.vae.config.scaling_factor == 0.5


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_as_pickles_of_tensors(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    for file, name in ((UNET, None), (VAE, None), (TEXT, "pytorch_model.bin")):
        weights = tmp_path / "m" / file
        torch.save(load_file(weights), weights.with_name(name or weights.name.replace(".safetensors", ".bin")))
        weights.unlink()
    made, expected = tiny_model(tmp_path / "m", trainable=False), tiny_model(tiny_path, trainable=False)
    assert equal(made.unet, expected.unet) and equal(made.vae, expected.vae)
    assert equal(made.text_encoder, expected.text_encoder)


class Hostile:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def refused(path: Path | str, says: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        tiny_model(path, trainable=False, **settings)  # type: ignore[arg-type]
    message = str(error.value)
    assert says in message and "\n" not in message, message


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "give a diffusers directory, a hub id, or emoji")
    refused("./no/thing", "model.path './no/thing': no such directory")
    refused("~/no-such-model", "no-such-model': no such directory")
    refused(tmp_path / "nothing.safetensors", "no such file")
    refused(tmp_path / "nothing.ckpt", "no such file")
    refused(tmp_path, "no model_index.json in it")
    refused("someone/some-model", "model.path 'someone/some-model': cannot be loaded")
    refused("someone/some-model", "needs the network or an earlier download")


def test_a_home_directory_is_found(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_path.parent))
    unet = f"~/{tiny_path.name}/unet"
    assert tiny_model(Path("~") / tiny_path.name, trainable=False, denoiser=unet).latent_shape() == SHAPE


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_not_there(tiny_path: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / part)
    refused(tmp_path / "m", f"model.path '{tmp_path / 'm'}': cannot be loaded")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def drop(file: Path) -> None:
    state = load_file(file)
    del state[max(state)]
    save_file(state, file, metadata={"format": "pt"})


def reshape(file: Path) -> None:
    state = load_file(file)
    state[max(state)] = torch.zeros(3)
    save_file(state, file, metadata={"format": "pt"})


def misspell(file: Path) -> None:
    (file.parent / "config.json").write_text('{"a": ')


@pytest.mark.parametrize("damage", [cut, drop, reshape, misspell, Path.unlink])
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_damaged_part(tiny_path: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    damage(tmp_path / "m" / file)
    refused(tmp_path / "m", f"model.path '{tmp_path / 'm'}': cannot be loaded")


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-an-unrelated-file"])
@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_hostile_pickle_in_a_directory(tiny_path: Path, tmp_path: Path, file: str, beside: bool) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    weights, mark = tmp_path / "m" / file, tmp_path / "mark"
    name = "pytorch_model.bin" if file == TEXT else weights.name.replace(".safetensors", ".bin")
    torch.save({"a": Hostile(mark)}, weights.with_name(name))
    if beside:
        weights.rename(weights.with_name("other.safetensors"))
    else:
        weights.unlink()
    refused(tmp_path / "m", f"{name}: rejected")
    assert not mark.exists()


def test_a_hostile_pickle_that_no_loader_would_read_harms_nobody(tiny_path: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    torch.save({"a": Hostile(tmp_path / "mark")}, tmp_path / "m/unet/diffusion_pytorch_model.bin")
    tiny_model(tmp_path / "m", trainable=False)
    assert not (tmp_path / "mark").exists()


def test_a_hostile_single_file(tiny_path: Path, tmp_path: Path) -> None:
    file, mark = tmp_path / "model.ckpt", tmp_path / "mark"
    torch.save({"state_dict": {"a": Hostile(mark)}}, file)
    refused(file, "loading it would run code")
    refused(tiny_path, "If you trust it, convert it to .safetensors", denoiser=str(file))
    directory = tmp_path / "unet"
    shutil.copytree(tiny_path / "unet", directory)
    (directory / "diffusion_pytorch_model.safetensors").unlink()
    file.rename(directory / "diffusion_pytorch_model.bin")
    refused(tiny_path, "rejected", denoiser=str(directory))
    assert not mark.exists()


def test_a_single_file_of_something_else(tiny_path: Path) -> None:
    refused(tiny_path / UNET, f"model.path '{tiny_path / UNET}': cannot be loaded")


def test_a_replacement_of_something_else(tiny_path: Path, tmp_path: Path) -> None:
    refused(
        tiny_path, "model.denoiser '/no/such.safetensors': no such file or directory", denoiser="/no/such.safetensors"
    )
    for given in (tiny_path / "vae", tiny_path / VAE):
        refused(tiny_path, f"model.denoiser '{given}': cannot be loaded", denoiser=str(given))
    file = tmp_path / "u.safetensors"
    file.write_bytes((tiny_path / UNET).read_bytes())
    drop(file)
    refused(tiny_path, f"model.denoiser '{file}': cannot be loaded", denoiser=str(file))
    cut(file)
    refused(tiny_path, f"{file}: damaged or not a safetensors file", denoiser=str(file))
