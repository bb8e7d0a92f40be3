"""Single files in the original layout of Stable Diffusion and SDXL, with the configurations that they lack."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from draftplus.config import ModelConfig
from draftplus.errors import UserError, notice
from draftplus.models.fitting import model_like
from draftplus.models.loading import LDM_UNET, Source
from draftplus.models.paths import PACKAGED
from draftplus.weights import read_header, read_state_dict

CLIP_G = "conditioner.embedders.1.model."  # how the names of SDXL's second text encoder begin
CONFIGS = Path(str(files("draftplus"))) / "assets" / "configs"
# what a whole model's file is by diffusers' inference -> the class of its pipeline
PIPELINES = {
    "v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"
}  # fmt: skip
# what a file's header may say of its architecture (the ModelSpec of stability.ai, which trainers write)
ARCHITECTURES = {"stable-diffusion-v2-512": "sd2-base", "stable-diffusion-v2-768-v": "sd2"}


def source(config: ModelConfig, path: str, bare: bool = False) -> Source:
    """A single file's tensors, and the directory of its configurations: `model.config`, or one in the package.

    Raises UserError for a file that is missing, would run code, or is of another family, which it names.
    """
    for key in ("revision", "variant"):
        if getattr(config, key) is not None:
            raise UserError(f"model.{key} does not apply to a single file, '{path}'; set model.{key}=null")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.path '{path}': no such file")
    header, says = _header(file)  # enough to refuse another family, whose file may be large
    directory = _configurations(config, path, _kind(path, header), header, says)
    if bare:
        return Source(config, directory, {}, bare=True)
    return Source(config, directory, {}, read_state_dict(file) if file.suffix == ".safetensors" else header)


def pipeline_class(config: ModelConfig, path: str) -> str:
    """The class of the pipeline of a single file: that of `model.config`, where it tells, or by what is in the file.

    Raises UserError for a file that is damaged or would run code, and one of another family.
    """
    if config.config is not None:
        index = _directory(config.config) / "model_index.json"
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
        if name in PIPELINES.values():
            return str(name)
    file = Path(path).expanduser()
    if not file.is_file():  # which is said where it is loaded
        return PIPELINES["v1"]
    state = file.stat()
    return _class_of(file, path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)
def _class_of(file: Path, path: str, size: int, changed: int) -> str:
    return PIPELINES[_kind(path, _header(file)[0])]


def _header(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    return read_header(file) if file.suffix == ".safetensors" else (read_state_dict(file), {})


def _kind(path: str, state: Mapping[str, Tensor]) -> str:
    """One of PIPELINES, by diffusers' own inference from names and shapes."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind: str = infer_diffusers_model_type(state)
    if kind not in PIPELINES:
        denoiser = not kind.startswith(("xl_", "inpaint", "instruct", "controlnet", "upscale", "playground"))
        what = (
            "; a file of its transformer, alone or with other parts, goes to model.denoiser, with a directory or hub "
            "id of the whole model in the diffusers layout as model.path"
        )
        raise UserError(
            f"model.path '{path}' is a model like {model_like(state)}, which is not supported; supported as single "
            "files are text-to-image models of Stable Diffusion 1.x, 2.x and SDXL" + what * denoiser
        )
    if (
        kind != "xl_base"
        and f"{LDM_UNET}label_emb.0.0.weight" in state
        and f"{CLIP_G}positional_embedding" not in state
    ):
        raise UserError(
            f"model.path '{path}' is a model with image conditioning (unCLIP), or SDXL's UNet without the text encoders"
            ", which is not supported; the latter goes to model.denoiser, with the whole model as model.path"
        )
    if not any(name.startswith(LDM_UNET) for name in state):
        raise UserError(
            f"model.path '{path}': cannot be loaded: it has no UNet in the original layout, whose names begin with "
            f"{LDM_UNET}; weights of one part go to model.denoiser or model.vae, with the whole model as model.path"
        )
    return kind


def _directory(given: str) -> Path:
    return CONFIGS / given if given in PACKAGED else Path(given).expanduser()


def _configurations(
    config: ModelConfig, path: str, kind: str, state: Mapping[str, Tensor], says: Mapping[str, str]
) -> Path:  # fmt: skip
    if config.config is not None:
        directory = _directory(config.config)
        if not (directory / "unet" / "config.json").is_file():
            raise UserError(
                f"model.config '{config.config}': no unet/config.json in it; give the directory of a model in the "
                f"diffusers layout, or one of {', '.join(PACKAGED)}"
            )
        return directory
    if kind == "xl_base" and ("v_pred" in state or says.get("modelspec.prediction_type") == "v"):
        raise UserError(
            f"model.path '{path}' says that it predicts v, which SDXL's configuration does not; set model.config to a "
            "directory in the diffusers layout whose scheduler_config.json has this model's prediction_type"
        )
    name = {"v1": "sd1", "xl_base": "sdxl"}.get(kind) or ARCHITECTURES.get(says.get("modelspec.architecture", ""))
    if name is None:
        name = "sd2"
        notice(
            f"model.path '{path}' is taken for Stable Diffusion 2.x that predicts v at 768 pixels, as by stock "
            "diffusers; if it is a base model of 512 pixels, set model.config=sd2-base"
        )
    return CONFIGS / name


def tokenizers(directory: Path) -> dict[str, Any]:
    """The tokenizers that go with configurations in the package, by folder; none of any other directory."""
    if directory.parent != CONFIGS:
        return {}
    return {folder.name: tokenizer(directory, folder.name) for folder in sorted(directory.glob("tokenizer*"))}


def tokenizer(directory: Path, name: str = "tokenizer") -> Any:
    """One that goes with the configurations of `source`."""
    from transformers import CLIPTokenizer

    if directory.parent != CONFIGS:
        return CLIPTokenizer.from_pretrained(directory, subfolder=name)
    settings = json.loads((directory / name / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary, merges = _clip()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), **settings)


@lru_cache
def _clip() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """The vocabulary of CLIP (Radford et al. 2021) and its merges, from which the vocabulary follows."""
    from tokenizers.pre_tokenizers import ByteLevel

    text = gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode("utf-8")
    merges = [tuple(line.split(" ")) for line in text.rstrip("\n").split("\n")]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges
