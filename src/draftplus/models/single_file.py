"""Single files in the original layout of Stable Diffusion, with the configurations that they lack."""

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
from draftplus.models.loading import LDM_UNET, Source
from draftplus.models.weights import read_header, read_state_dict

CONFIGS = Path(str(files("draftplus"))) / "assets" / "configs"
PACKAGED = ("sd1", "sd2", "sd2-base")
# what a file's header may say of its architecture (the ModelSpec of stability.ai, which trainers write)
ARCHITECTURES = {"stable-diffusion-v2-512": "sd2-base", "stable-diffusion-v2-768-v": "sd2"}


def source(config: ModelConfig, path: str) -> Source:
    """A single file's tensors, and the directory of its configurations: `model.config`, or one in the package.

    Raises UserError for a file that is missing, would run code, or is of another family, which it names.
    """
    for key in ("revision", "variant"):
        if getattr(config, key) is not None:
            raise UserError(f"model.{key} does not apply to a single file, '{path}'; set model.{key}=null")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.path '{path}': no such file")
    if file.suffix != ".safetensors":
        state = read_state_dict(file)
        return Source(config, _configurations(config, path, _kind(path, state), {}), {}, state)
    header, says = read_header(file)  # enough to refuse another family, whose file may be large
    directory = _configurations(config, path, _kind(path, header), says)
    return Source(config, directory, {}, read_state_dict(file))


def _kind(path: str, state: Mapping[str, Tensor]) -> str:
    """v1 or v2, by diffusers' own inference from names and shapes."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    kind: str = infer_diffusers_model_type(state)
    if kind not in ("v1", "v2"):
        like = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        raise UserError(
            f"model.path '{path}' is a model like {like}, which is not supported; supported are text-to-image models "
            "of Stable Diffusion 1.x and 2.x"
        )
    if f"{LDM_UNET}label_emb.0.0.weight" in state:
        raise UserError(f"model.path '{path}' is a model with image conditioning (unCLIP), which is not supported")
    if not any(name.startswith(LDM_UNET) for name in state):
        raise UserError(
            f"model.path '{path}': cannot be loaded: it has no UNet in the original layout, whose names begin with "
            f"{LDM_UNET}; weights of one part go to model.denoiser or model.vae"
        )
    return kind


def _configurations(config: ModelConfig, path: str, kind: str, says: Mapping[str, str]) -> Path:
    if config.config is not None and config.config not in PACKAGED:
        directory = Path(config.config).expanduser()
        if not (directory / "unet" / "config.json").is_file():
            raise UserError(
                f"model.config '{config.config}': no unet/config.json in it; give the directory of a model in the "
                f"diffusers layout, or one of {', '.join(PACKAGED)}"
            )
        return directory
    name = config.config or ("sd1" if kind == "v1" else ARCHITECTURES.get(says.get("modelspec.architecture", "")))
    if name is None:
        name = "sd2"
        notice(
            f"model.path '{path}' is taken for Stable Diffusion 2.x that predicts v at 768 pixels, as by stock "
            "diffusers; if it is a base model of 512 pixels, set model.config=sd2-base"
        )
    return CONFIGS / name


def tokenizer(directory: Path) -> Any:
    """The tokenizer that goes with the configurations of `source`."""
    from transformers import CLIPTokenizer

    if directory.parent != CONFIGS:
        return CLIPTokenizer.from_pretrained(directory, subfolder="tokenizer")
    settings = json.loads((directory / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
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
