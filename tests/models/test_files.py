"""Which files of a model are read: variants, shards, pickles, those of the hub; and none that no loader reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models.files import choose, forms
from draftplus.models.stable_diffusion import StableDiffusion, load
from tests.support.ldm import unet_as_ldm
from tests.tiny import CPU, save_tiny, stock_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The `local_dir_use_symlinks`:UserWarning")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}  # fmt: skip
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


class Hostile:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def copy(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_path, tmp_path / "m"))


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_tiny(tmp_path_factory.mktemp("other") / "model", seed=5)


def named(file: str, variant: str) -> str:
    stem, _, ending = file.rpartition(".")
    return f"{stem}.{variant}.{ending}"


def as_pickle(file: Path) -> Path:
    """Replaces a .safetensors file by the .bin file that the libraries look for."""
    name = file.name.replace(".safetensors", ".bin")
    new = file.with_name(f"pytorch_{name}" if name.startswith("model") else name)
    torch.save(load_file(file), new)
    file.unlink()
    return new


def loaded(path: Path | str, dtype: torch.dtype = torch.float64, **settings: Any) -> StableDiffusion:
    """Read from the disk, not a model that was read before."""
    return load(ModelConfig(path=str(path), **settings), str(path), CPU, trainable=False, dtype=dtype)


def assert_same(path: Path | str, expected: Any, **settings: Any) -> None:
    """All weights equal those of the stock pipeline's parts."""
    made = loaded(path, **settings)
    for part in WEIGHTS:
        a, b = getattr(made, part).state_dict(), getattr(expected, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


def refused(path: Path | str, says: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        loaded(path, **settings)
    message = str(error.value)
    assert says in message and "\n" not in message, message


@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "bin"])
def test_a_directory_that_holds_only_a_variant(copy: Path, pickle: bool) -> None:
    for part, file in WEIGHTS.items():
        new = (copy / part / file).rename(copy / part / named(file, "fp16"))
        if pickle:
            as_pickle(new)
    stock = StableDiffusionPipeline.from_pretrained(copy, variant="fp16", torch_dtype=torch.float64)
    assert_same(copy, stock)
    assert_same(copy, stock, variant="fp16")
    refused(copy, "model.variant 'bf16'", variant="bf16")
    refused(copy, "its variants: fp16", variant="bf16")


def test_a_variant_beside_plain_files_is_loaded_when_asked_for(tiny_path: Path, other_path: Path, copy: Path) -> None:
    for part, file in WEIGHTS.items():
        if part != "vae":  # which then is loaded without, as by stock diffusers
            shutil.copy(other_path / part / file, copy / part / named(file, "fp16"))
    assert_same(copy, stock_pipeline(tiny_path))
    assert_same(
        copy,
        StableDiffusionPipeline.from_pretrained(copy, variant="fp16", torch_dtype=torch.float64),
        variant="fp16",
    )
    assert not torch.equal(
        loaded(copy, variant="fp16").unet.conv_in.weight,
        loaded(copy).unet.conv_in.weight,
    )
    refused(tiny_path, "its variants: none", variant="fp16")


def test_several_variants_and_no_plain_files(copy: Path) -> None:
    file = copy / "unet" / WEIGHTS["unet"]
    shutil.copy(file, file.with_name(named(file.name, "fp16")))
    file.rename(file.with_name(named(file.name, "non_ema")))
    refused(copy, "unet: its weights are fp16 or non_ema; choose with model.variant=fp16")
    assert loaded(copy, variant="non_ema").latent_shape() == (4, 8, 8)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "bin"])
def test_shards(tiny_path: Path, copy: Path, pickle: bool, variant: str | None) -> None:
    pipe = stock_pipeline(tiny_path, torch.float32)
    for part in WEIGHTS:
        shutil.rmtree(copy / part)
        getattr(pipe, part).save_pretrained(copy / part, max_shard_size="20KB", variant=variant)
        assert len(list((copy / part).glob("*-of-*"))) > 1
        if pickle:
            (index,) = (copy / part).glob("*.index*.json")
            told, old = json.loads(index.read_text()), index.name
            bins = {file: as_pickle(copy / part / file).name for file in set(told["weight_map"].values())}
            told["weight_map"] = {key: bins[file] for key, file in told["weight_map"].items()}
            new = old.replace(".safetensors", ".bin")
            index.with_name(f"pytorch_{new}" if new.startswith("model") else new).write_text(json.dumps(told))
            index.unlink()
    assert_same(copy, stock_pipeline(tiny_path))
    assert_same(copy, stock_pipeline(tiny_path), variant=variant)
    shard = max((copy / "unet").glob("*-of-*"))
    shard.write_text(POINTER)
    refused(copy, f"{shard}: a pointer to a large file, not the weights")
    if pickle:
        torch.save({"a": Hostile(copy / "mark")}, shard)
        refused(copy, f"{shard}: rejected")
        assert not (copy / "mark").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_replacement_that_holds_only_a_variant(tiny_path: Path, other_path: Path, copy: Path, part: str) -> None:
    given = copy / part
    shutil.copy(other_path / part / WEIGHTS[part], given / named(WEIGHTS[part], "fp16"))
    (given / WEIGHTS[part]).unlink()
    key = "denoiser" if part == "unet" else "vae"
    made = loaded(tiny_path, **{key: str(given)})
    expected = getattr(stock_pipeline(other_path), part).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in getattr(made, part).state_dict().items())


def test_a_replaced_part_needs_no_weights_of_its_own(tiny_path: Path, other_path: Path, copy: Path) -> None:
    (copy / "unet" / WEIGHTS["unet"]).unlink()
    made = loaded(copy, denoiser=str(other_path / "unet"))
    assert torch.equal(made.unet.conv_in.weight, stock_pipeline(other_path).unet.conv_in.weight)


STEMS = ["diffusion_pytorch_model", "model", "pytorch_model"]


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        ("d.bin d.safetensors", None, "d.safetensors"),
        ("d.fp16.safetensors d.bin", None, "d.bin"),
        ("d.fp16.bin d.safetensors", "fp16", "d.fp16.bin"),
        ("d.safetensors.index.json d.safetensors d-00001-of-00002.safetensors", None, "d.safetensors.index.json"),
        ("d.safetensors.index.fp16.json d.fp16-00001-of-00002.safetensors", None, "d.safetensors.index.fp16.json"),
        ("d.safetensors.fp16.index.json d-00001-of-00002.fp16.safetensors", None, "d.safetensors.fp16.index.json"),
        ("m.safetensors.index.json m.safetensors", None, "m.safetensors"),
        ("p.bin.index.json p-00001-of-00002.bin", None, "p.bin.index.json"),
        ("flax_model.msgpack d.onnx optimizer.bin training_args.bin other.safetensors", None, None),
        ("p.bin m.fp16.safetensors", "fp16", "m.fp16.safetensors"),
    ],
)
def test_the_choice(names: str, variant: str | None, expected: str | None) -> None:
    long = {stem[0]: stem for stem in STEMS}
    spelled = [long.get(n[0], "") + n[1:] if n[1] in ".-" else n for n in names.split()]
    found = choose(forms(spelled, of_diffusers=names[0] == "d"), variant, "x")
    assert (found and found.file) == (expected and long[expected[0]] + expected[1:])


def test_pickles_that_no_loader_reads_harm_nobody(tiny_path: Path, copy: Path) -> None:
    for folder in ("safety_checker", "checkpoint-500/unet", "feature_extractor"):
        (copy / folder).mkdir(parents=True)
    (copy / "safety_checker/pytorch_model.bin").write_text(POINTER)
    for name in ("training_args.bin", "unet/optimizer.bin", "unet/pytorch_model.bin", "checkpoint-500/optimizer.bin",
                 "checkpoint-500/unet/diffusion_pytorch_model.bin", "text_encoder/diffusion_pytorch_model.bin",
                 "vae/diffusion_pytorch_model.fp16.bin"):  # fmt: skip
        torch.save({"a": Hostile(copy / "mark")}, copy / name)
    assert_same(copy, stock_pipeline(tiny_path))
    assert not (copy / "mark").exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "bin"])
def test_a_file_that_was_not_fetched_says_so(copy: Path, part: str, pickle: bool) -> None:
    file = copy / part / WEIGHTS[part]
    if pickle:
        file = as_pickle(file)
    file.write_text(POINTER)
    refused(copy, f"{file}: a pointer to a large file, not the weights; fetch them with: git lfs pull")


def test_a_directory_of_pickles_is_read_without_noise(
    tiny_path: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The libraries print what they log to the stderr that they found when they were imported, not to a test's."""
    for part, file in WEIGHTS.items():
        as_pickle(copy / part / file)
    with caplog.at_level("ERROR", "diffusers"):
        StableDiffusionPipeline.from_pretrained(copy)
        assert "no file named diffusion_pytorch_model.safetensors" in caplog.text  # stock's noise would be heard
        caplog.clear()
        made = loaded(copy, torch.float32)
    assert caplog.text == ""
    assert torch.equal(made.unet.conv_in.weight, stock_pipeline(tiny_path, torch.float32).unet.conv_in.weight)


ID, COMMIT = "me/tiny", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty: the folder that takes the snapshot of a repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_hub_model_in_the_cache(tiny_path: Path, cache: Path) -> None:
    """Without the network."""
    shutil.copytree(tiny_path, cache)
    assert_same(ID, stock_pipeline(tiny_path))
    file = cache / "unet" / WEIGHTS["unet"]
    file = file.rename(file.with_name(named(file.name, "fp16")))
    assert_same(ID, stock_pipeline(tiny_path), vae=str(tiny_path / "vae"))
    torch.save({"a": Hostile(cache / "mark")}, file.with_name("diffusion_pytorch_model.bin"))
    refused(ID, "diffusion_pytorch_model.bin: rejected", revision="main")
    assert not (cache / "mark").exists()


def test_only_what_is_loaded_is_fetched(tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub: configurations first, then the weights of the variant; not those that are replaced."""
    remote = Path(shutil.copytree(tiny_path, cache.parents[2] / "remote"))
    for part, file in WEIGHTS.items():
        shutil.copy(remote / part / file, remote / part / named(file, "fp16"))
    (remote / "safety_checker").mkdir()
    torch.save({"a": Hostile(cache / "mark")}, remote / "safety_checker/pytorch_model.bin")
    listed = [file.relative_to(remote).as_posix() for file in remote.rglob("*") if file.is_file()]
    got: list[str] = []

    def download(path: str, revision: str | None, allow_patterns: list[str]) -> str:
        for name in listed:
            if any(fnmatch(name, pattern) for pattern in allow_patterns) and not (cache / name).exists():
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, cache / name)
                got.append(name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: listed)
    loaded(ID, variant="fp16", denoiser=str(tiny_path / "unet"))
    heavy = [name for name in got if not name.endswith((".json", ".txt"))]
    assert sorted(heavy) == ["text_encoder/model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    loaded(ID)
    assert got[-3:] and {Path(name).name for name in got[-3:]} == set(WEIGHTS.values())


def test_another_family_is_refused_before_its_weights_are_fetched(
    tiny_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, file in WEIGHTS.items():
        target = cache / part / "config.json"
        target.parent.mkdir(parents=True)
        shutil.copy(tiny_path / part / "config.json", target)
        assert not (cache / part / file).exists()
    shutil.copy(tiny_path / "model_index.json", cache)
    file = cache / "unet/config.json"
    plain = json.loads(file.read_text())
    shutil.copytree(tiny_path / "tokenizer", cache / "tokenizer")
    for changes in (
        {"in_channels": 9}, {"addition_embed_type": "text_time"}, {"class_embed_type": "projection"},
        {"num_class_embeds": 7}, {"encoder_hid_dim_type": "text_proj"}, {"cross_attention_dim": 1024},
    ):  # fmt: skip
        file.write_text(json.dumps({**plain, **changes}))
        refused(ID, f"model.path '{ID}' is not a text-to-image model of the Stable Diffusion 1.x/2.x family")
    file.write_text(json.dumps({**plain, "_class_name": "FluxTransformer2DModel"}))
    refused(ID, "its unet is a FluxTransformer2DModel, which is not supported, only UNet2DConditionModel")
    file.write_text(json.dumps(plain))
    refused(ID, "cannot be loaded")


def test_a_replacement_in_older_spellings(tiny_path: Path, tmp_path: Path) -> None:
    """A file of an autoencoder saved by diffusers before 0.17, and a UNet of the original layout without its prefix."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(tiny_path / "vae" / WEIGHTS["vae"]).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = tensor
    assert any(".proj_attn." in name for name in state)
    save_file(state, tmp_path / "vae.safetensors")
    unet = unet_as_ldm(load_file(tiny_path / "unet" / WEIGHTS["unet"]))
    torch.save({name.removeprefix("model.diffusion_model."): t for name, t in unet.items()}, tmp_path / "u.ckpt")
    other = save_tiny(tmp_path / "other", seed=5)
    made = loaded(
        other, vae=str(tmp_path / "vae.safetensors"), denoiser=str(tmp_path / "u.ckpt")
    )  # fmt: skip
    expected = stock_pipeline(tiny_path)
    for part in ("unet", "vae"):
        found, wanted = getattr(made, part).state_dict(), getattr(expected, part).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
