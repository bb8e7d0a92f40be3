"""The stock pipeline of a kind without its networks' weights, and where these are read from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models import loading, single_file
from draftplus.models.paths import is_single_file

if TYPE_CHECKING:
    from draftplus.models.kind import Kind

BESIDE = ("image_encoder", "feature_extractor", "safety_checker")  # parts that are for other tasks
ABSENT = [None, None]  # how an index says that a part is not there; stock loads such a model only when told so


def source(kind: Kind, config: ModelConfig, path: str, bare: bool = False) -> tuple[loading.Source, dict[str, Any]]:
    """Where a model's parts are read from, and the class of each. bare: without any weights."""

    def accept(parts: Mapping[str, Any]) -> None:
        try:
            kind.accepts(parts)
        except (UserError, ValueError) as error:
            given = {f"model.{key}": getattr(config, key) for key in ("denoiser", "vae")}
            replaced = "".join(f" with {key}={value}" for key, value in given.items() if value is not None)
            raise UserError(f"model.path '{path}'{replaced}: {error}") from None

    if is_single_file(path):
        made = single_file.source(config, path, bare)
        there = present(kind, made.directory)
        accept(loading.configurations(there, made))
        return made, there
    directory = loading.fetched(config, path)
    there = present(kind, directory)
    return loading.source(config, path, directory, there, accept, bare), there


def present(kind: Kind, directory: Path) -> dict[str, Any]:
    """The class of each network that a model has, by its folder.

    Raises ValueError for a class that the family does not have, or a part that it cannot do without.
    """
    index, found = index_of(directory), {}
    for folder, names in kind.networks.items():
        name, cls = _class_in(index, folder)
        if name is None and folder in kind.optional:
            continue
        if name is None:
            raise ValueError(f"its model_index.json names no {folder}")
        if name not in names:
            raise ValueError(f"its {folder} is a {name}, which is not supported, only {' or '.join(names)}")
        found[folder] = cls
    for folder in ("scheduler", *(name.replace("text_encoder", "tokenizer") for name in found if "encoder" in name)):
        name, cls = _class_in(index, folder)
        if name is None:
            raise ValueError(f"its model_index.json names no {folder}")
        if cls is None:
            raise ValueError(f"its {folder} is a {name}, which neither diffusers nor transformers has")
    if not (directory / "scheduler" / "scheduler_config.json").is_file():
        raise FileNotFoundError("it has no scheduler/scheduler_config.json")
    return found


def _class_in(index: Mapping[str, Any], folder: str) -> tuple[str | None, Any]:
    """The name of a part's class in an index, and the class; None where there is none."""
    import diffusers
    import transformers

    told = index.get(folder, ABSENT)
    if not isinstance(told, list) or len(told) != 2:
        raise ValueError(f"its model_index.json says {told!r} of {folder}, where a library and a class are expected")
    library = {"diffusers": diffusers, "transformers": transformers}.get(told[0])
    return told[1], getattr(library, str(told[1]), None)


def without_weights(kind: Kind, source: loading.Source, there: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The stock pipeline with its tokenizers and settings, its denoiser and autoencoder without weights."""
    import diffusers

    given: dict[str, Any] = {**dict.fromkeys(kind.networks), **single_file.tokenizers(source.directory)}
    for name in (kind.component, "vae"):
        with torch.device("meta"):
            given[name] = there[name].from_config(there[name].load_config(source.folder(name))).to(dtype)
    cls = getattr(diffusers, kind.pipeline)
    given |= {name: None for name, told in index_of(source.directory).items() if told == ABSENT}
    given |= {name: None for name in cls._optional_components if name in BESIDE}
    pipe = cls.from_pretrained(source.directory, local_files_only=True, **given)
    for name in (name for name in pipe.config if name.startswith("tokenizer")):
        tokenizer = getattr(pipe, name)
        # transformers does not miss the files of one
        if tokenizer is not None and tokenizer.vocab_size <= len(tokenizer.all_special_ids):
            raise ValueError(f"its {name} has no vocabulary")
    return pipe


def index_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "model_index.json").read_text(encoding="utf-8")))


def scheduler_config(directory: Path) -> Mapping[str, Any]:
    from diffusers import DDIMScheduler

    config: Mapping[str, Any] = DDIMScheduler.load_config(directory, subfolder="scheduler")
    return config
