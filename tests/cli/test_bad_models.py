"""What is wrong with a model's directory or file is said in one line before anything is drawn. Exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.pipelines import save_pipeline

Refused = Callable[..., None]
SMALL = ["device=cpu", "sampler.steps=1", "sampler.height=64", "sampler.width=64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny pipelines; read only."""
    directory = tmp_path_factory.mktemp("models")
    for name in ("sdxl", "sd3"):
        save_pipeline(name, directory / name)
    return directory


@pytest.fixture
def broken(models: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a copy of a tiny pipeline, to be changed; its files are links."""

    def copy(name: str) -> Path:
        made = tmp_path / "model"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(models / name, made, copy_function=lambda a, b: Path(b).symlink_to(a))
        (made / "model_index.json").unlink()
        shutil.copy(models / name / "model_index.json", made)
        return made

    yield copy


def index(**changes: Any) -> Callable[[Path], None]:
    """Changes entries of the index; "gone" removes one."""

    def change(model: Path) -> None:
        told = {**json.loads((model / "model_index.json").read_text()), **changes}
        (model / "model_index.json").write_text(json.dumps({k: v for k, v in told.items() if v != "gone"}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for name in names:
            shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return remove


def emptied(folder: str) -> Callable[[Path], None]:
    return lambda model: [file.unlink() for file in (model / folder).iterdir()] and None


def replaced(name: str, text: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).write_text(text)

    return write


SHARDS = json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
NONE = [None, None]
CASES = {
    "no folder of a text encoder": (without("text_encoder_2"), "it has no text_encoder_2/config.json"),
    "a text encoder that is null": (index(text_encoder_2=NONE), "model_index.json names no text_encoder_2"),
    "a text encoder that is not named": (index(text_encoder="gone"), "model_index.json names no text_encoder"),
    "another text encoder": (
        index(text_encoder=["transformers", "BertModel"]), "its text_encoder is a BertModel, which is not supported",
    ),
    "no scheduler file": (without("scheduler/scheduler_config.json"), "it has no scheduler/scheduler_config.json"),
    "a scheduler that is null": (index(scheduler=NONE), "model_index.json names no scheduler"),
    "a scheduler that is none": (
        index(scheduler=["diffusers", "MyScheduler"]), "its scheduler is a MyScheduler, which neither diffusers nor",
    ),
    "code of one's own": (index(tokenizer=["mine", "Tokenizer"]), "its tokenizer is a Tokenizer, which neither"),
    "no tokenizer": (without("tokenizer"), "its tokenizer has no vocabulary"),
    "an empty tokenizer": (emptied("tokenizer_2"), "its tokenizer_2 has no vocabulary"),
    "a tokenizer that is null": (index(tokenizer_2=NONE), "model_index.json names no tokenizer_2"),
    "another pipeline": (
        index(_class_name="KolorsPipeline"), "is a KolorsPipeline, which is not supported; supported: Stable.*XLPipe",
    ),
    "an index of other contents": (index(vae="AutoencoderKL"), "model_index.json says 'AutoencoderKL' of vae"),
    "no weights": (without("vae/diffusion_pytorch_model.safetensors"), "there are no weights in its folder vae"),
    "a shard that is not there": (
        replaced("vae/diffusion_pytorch_model.safetensors.index.json", SHARDS), "of-00002.safetensors: it is missing",
    ),
    "a configuration that is not JSON": (replaced("text_encoder/config.json", "{"), "is not a valid JSON file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_directory_that_is_not_whole(
    refused: Refused, broken: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    change, says = CASES[case]
    for name in ("sdxl", "sd3") if case.startswith(("a text", "a tok", "an empty")) else ("sdxl",):
        model = broken(name)
        change(model)
        refused(["generate", model, "--prompt", "a cat", "-o", tmp_path / "out", *SMALL], str(model), says)
        assert not (tmp_path / "out").exists()


def test_another_denoiser_in_the_index(refused: Refused, broken: Callable[[str], Path]) -> None:
    model = broken("sd3")
    index(transformer=["diffusers", "PixArtTransformer2DModel"])(model)
    refused(["generate", model, "--prompt", "a", *SMALL], "its transformer is a PixArtTransformer2DModel, which is not")


SIZES = [
    ("sdxl", 60, "must be a multiple of 8"),
    ("sd3", 72, "must be a multiple of 16"),
    ("sd3", 400, "most 384 pixels"),
]


@pytest.mark.parametrize(("name", "pixels", "says"), SIZES)
def test_sizes_that_do_not_fit(refused: Refused, models: Path, name: str, pixels: int, says: str) -> None:
    for key in ("height", "width"):
        command = ["generate", models / name, "--prompt", "a cat", *SMALL, f"sampler.{key}={pixels}"]
        refused(command, rf"sampler\.{key} is {pixels}; ", says)


def test_parts_of_another_family(refused: Refused, models: Path, tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    names = {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1), "img_in.weight": torch.zeros(1, 64)}
    save_file(names, file)
    sdxl, sd3 = models / "sdxl", models / "sd3"
    for model, key, given, says in (
        (sdxl, "denoiser", sd3 / "transformer", "it is a SD3Transformer2DModel, which is not supported"),
        (sdxl, "vae", sd3 / "vae", "its UNet is not one of"),
        (
            sd3,
            "denoiser",
            file,
            "like those of black-forest-labs/FLUX.1-schnell: missing: .* and [0-9]+ more; not among",
        ),
        (sd3, "vae", tmp_path / "none", "no such file or directory"),
    ):
        command = ["generate", model, "--prompt", "a cat", *SMALL, f"model.{key}={given}"]
        refused(command, rf"model\.{key}", str(given), says)
    refused(["generate", file, "--prompt", "a cat", *SMALL], "like .*FLUX.1-schnell", r"goes to model\.denoiser")
