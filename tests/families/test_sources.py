"""Where the parts of every family come from: the hub, with what is fetched of it, and what a run remembers of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models import families
from draftplus.models.stored import loaded_variant, stored_dtype
from draftplus.runs.inputs import PARTS, model_hashes
from tests.families.cases import load_model
from tests.families.conftest import Saved
from tests.support.pipelines import stock

ID, COMMIT = "me/tiny", "0123456789abcdef0123456789abcdef01234567"
Hub = Callable[[Path], list[str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Makes the hub hold one repository with the files of a directory. Returns what is fetched of it."""
    cache = tmp_path / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    got: list[str] = []

    def hold(remote: Path) -> list[str]:
        listed = sorted(file.relative_to(remote).as_posix() for file in remote.rglob("*") if file.is_file())

        def fetch(name: str) -> None:
            if not (cache / name).exists():
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, cache / name)
                got.append(name)

        def snapshot(path: str, revision: str | None, allow_patterns: list[str]) -> str:
            assert path == ID and revision in ("v2", COMMIT)
            for name in listed:
                if any(fnmatch(name, pattern) for pattern in allow_patterns):
                    fetch(name)
            return str(cache)

        def one(path: str, name: str, revision: str | None = None) -> str:
            assert path == ID and revision == "v2"
            fetch(name)
            return str(cache / name)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", one)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: listed)
        monkeypatch.setattr(families, "why_offline", lambda: None)
        return got

    families.hub_index.cache_clear()
    yield hold
    families.hub_index.cache_clear()


def test_of_the_hub_only_what_is_loaded_is_fetched(name: str, directory: Path, tmp_path: Path, hub: Hub) -> None:
    """A variant in shards, as large models are stored; the plain files, pickles and other layouts beside it are not."""
    remote = Path(shutil.copytree(directory, tmp_path / "remote"))
    pipe = stock(directory)
    networks = [
        one for one in json.loads((remote / "model_index.json").read_text()) if list(remote.glob(f"{one}/*.saf*"))
    ]
    for part in networks:
        getattr(pipe, part).save_pretrained(
            remote / part, variant="bf16", max_shard_size="30KB", safe_serialization=True
        )
        (remote / part / "pytorch_model.bin").write_bytes(b"harm")
    for file in ("whole.safetensors", "README.md", "text_encoder/model.onnx", "examples/a.png"):
        (remote / file).parent.mkdir(exist_ok=True)
        (remote / file).write_bytes(b"large")
    got = hub(remote)
    made = load_model(Path(ID), torch.float32, trainable=False, revision="v2", variant="bf16")  # type: ignore[arg-type]
    small = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}
    assert {one for one in small if not one.endswith(".safetensors")} <= set(got), "tokenizers and templates too"
    heavy = [one for one in got if not one.endswith((".json", ".txt", ".model", ".jinja"))]
    assert all(".bf16" in one and "-of-" in one for one in heavy if "vae" not in one), heavy
    assert {one.partition("/")[0] for one in heavy} == set(networks)
    assert len(heavy) > 2 * len(networks)
    (folder,) = [remote / one for one in ("unet", "transformer") if (remote / one).is_dir()]
    plain = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, plain[key]) for key, tensor in made.tuned.denoiser.state_dict().items())
    assert made.encode(["a cat"]).hidden.isfinite().all()


def test_a_model_that_is_not_there_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "why_offline", lambda: "HF_HUB_OFFLINE is set")
    families.hub_index.cache_clear()
    with pytest.raises(UserError) as told:
        load_model(Path("me/not-there"))
    message = str(told.value)
    assert "\n" not in message and message.startswith("model.path 'me/not-there': it is neither on this disk nor in")
    for says in ("HF_HUB_OFFLINE is set", "hf download me/not-there", "--local-dir", "model.path="):
        assert says in message


def test_weights_that_are_not_in_the_cache_without_the_hub(saved: Saved, tmp_path: Path, hub: Hub) -> None:
    """An earlier command fetched the configurations only."""
    remote = Path(shutil.copytree(saved("sdxl"), tmp_path / "remote", ignore=shutil.ignore_patterns("*.safetensors")))
    hub(remote)
    with pytest.raises(UserError) as told:
        load_model(Path(ID), revision="v2")
    message = str(told.value)
    assert "\n" not in message and "has no weights of unet, vae, text_encoder, text_encoder_2" in message
    assert f"hf download {ID} --local-dir DIRECTORY" in message and "model.path=DIRECTORY" in message


def test_a_run_remembers_each_file_that_shapes_it(name: str, directory: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    config = ModelConfig(path=str(model))
    before = model_hashes(config)
    files = [file for file in sorted(model.rglob("*")) if file.is_file() and PARTS.fullmatch(file.parent.name)]
    assert {file.parent.name for file in files} >= {"scheduler", "vae", "text_encoder", "tokenizer"}
    for file in [*files, model / "model_index.json"]:
        whole = file.read_bytes()
        file.write_bytes(whole + b"\n" if file.suffix != ".safetensors" else whole[:-1] + b"x")
        assert model_hashes(config) != before, file
        file.write_bytes(whole)
    for key, part in (("vae", "vae"), ("denoiser", "unet" if (model / "unet").is_dir() else "transformer")):
        replaced = ModelConfig(path=str(model), **{key: str(directory / part)})
        of_both = model_hashes(replaced)
        assert of_both.keys() == {"model.path", f"model.{key}"}
        file = model / part / "diffusion_pytorch_model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(b"other")
        assert model_hashes(replaced) == of_both, "its own weights are not read"
        file.write_bytes(whole)
    assert (stored_dtype(config), loaded_variant(config)) == (torch.float32, None)
    assert stored_dtype(ModelConfig(path=str(model), denoiser=str(directory / part))) == torch.float32


def test_a_part_that_the_index_leaves_out_is_not_looked_at(saved: Saved, tmp_path: Path) -> None:
    model = Path(shutil.copytree(saved("sd3_without_t5"), tmp_path / "model"))
    before = model_hashes(ModelConfig(path=str(model)))
    shutil.copytree(saved("sd3") / "text_encoder_3", model / "text_encoder_3")
    assert model_hashes(ModelConfig(path=str(model))) == before
