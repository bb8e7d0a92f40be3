"""Loading the parts of a model from a diffusers directory, the hub, or replacement weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from draftplus.errors import UserError
from draftplus.models.weights import first_line, read_state_dict, refuse_code

SINGLE_FILE = (".safetensors", ".ckpt")


def is_single_file(path: str) -> bool:
    """Whether a path names one file of weights."""
    return path.endswith(SINGLE_FILE)


def source(path: str) -> str:
    """`directory_of`, and nothing in the directory needs to run code to be loaded.

    Raises UserError also for a directory that contains a pickle that would run code.
    """
    path = directory_of(path)
    if Path(path).is_dir():
        refuse_code(Path(path))
    return path


def directory_of(path: str) -> str:
    """A directory with a diffusers model, or something that can be a hub id.

    Raises UserError for a directory that is missing or contains something else.
    """
    path = os.path.expanduser(path)  # keeps a leading ./
    if looks_local(path) and not Path(path).is_dir():
        raise UserError(f"model.path '{path}': no such directory; give a diffusers directory, a hub id, or emoji")
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"model.path '{path}': no model_index.json in it, so it is not a diffusers model directory")
    return path


def looks_local(path: str) -> bool:
    """Whether a path cannot be a hub id, which is OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def load_part(
    cls: Any, path: str, name: str, dtype: Mapping[str, torch.dtype], hub: Mapping[str, Any],
    replacement: str | None = None, key: str = "",
) -> Any:  # fmt: skip
    """A network of a pipeline; `name` is its subfolder.

    dtype: under the keyword that the class expects. replacement, key: weights to use instead, a directory or a file in
    diffusers' or the original layout, and the configuration key that names them.

    Raises UserError if these are missing or would run code, ValueError where weights are incomplete, and whatever
    the libraries raise; `loading` makes one error of them.
    """
    if replacement is None:
        return whole(*cls.from_pretrained(path, subfolder=name, output_loading_info=True, **dtype, **hub))
    given = Path(replacement).expanduser()
    if not given.exists():
        raise UserError(f"{key} '{replacement}': no such file or directory")
    if given.is_dir():
        refuse_code(given)
        with loading(key, replacement):
            return whole(*cls.from_pretrained(given, output_loading_info=True, **dtype))
    state = read_state_dict(given)
    with loading(key, replacement):
        part = cls.from_single_file(state, config=path, subfolder=name, **dtype)
        return whole(part, {"missing_keys": [key for key, p in part.named_parameters() if p.is_meta]})


def decodes_in_float32(vae: Any) -> bool:
    """Whether an autoencoder's configuration says that it overflows in float16, as stock pipelines ask of SDXL's.

    One that says nothing about it has the same setting, by default, and no meaning.
    """
    told = vae.config.force_upcast and "force_upcast" not in vae.config.get("_use_default_values", ())
    return bool(told and vae.dtype == torch.float16)


def whole(part: Any, info: Mapping[str, Any]) -> Any:
    """The part. info: what its loader reports. Raises ValueError if weights are missing."""
    # the loaders fill missing weights with random numbers, or leave them empty
    if info["missing_keys"]:
        raise ValueError(f"its weights are incomplete: '{min(info['missing_keys'])}' is missing")
    return part


@contextmanager
def loading(key: str, value: str, family: str = "") -> Iterator[None]:
    """Turns whatever the libraries raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # those of four libraries have no base class in common
        hint = ""
        if isinstance(error, OSError) and not Path(value).expanduser().is_dir():
            hint = (
                " (a model that is not on this disk is read from the hub, which needs the network or an earlier "
                "download)"
            )
        wanted = f" as {family}" if family else ""
        raise UserError(f"{key} '{value}': cannot be loaded{wanted}: {first_line(error)}{hint}") from error
