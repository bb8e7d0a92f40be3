"""What `model.path` and `model.config` can be: a directory, a hub id, one file, or what is in the package."""

from __future__ import annotations

import os
from pathlib import Path

from draftplus.errors import UserError

SINGLE_FILE = (".safetensors", ".ckpt")
PACKAGED = ("sd1", "sd2", "sd2-base", "sdxl")  # configurations of single files


def is_single_file(path: str) -> bool:
    """Whether a path names one file of weights."""
    return path.endswith(SINGLE_FILE)


def directory_of(path: str) -> str:
    """A directory with a diffusers model, or something that can be a hub id.

    Raises UserError for a directory that is missing or contains something else.
    """
    path = os.path.expanduser(path)  # keeps a leading ./
    refuse_whole(path)
    if looks_local(path) and not Path(path).is_dir():
        raise UserError(f"model.path '{path}': no such directory; give a diffusers directory, a hub id, or emoji")
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise UserError(f"model.path '{path}': no model_index.json in it, so it is not a diffusers model directory")
    return path


def looks_local(path: str) -> bool:
    """Whether a path cannot be a hub id, which is OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def refuse_whole(path: str) -> None:
    """UserError for a .nemo file where a whole model is expected, which says where what is in it goes."""
    if path.endswith(".nemo"):
        raise UserError(
            f"model.path '{path}': a .nemo file is not read as a whole model; a UNet in it goes to model.denoiser, an "
            "adapter to --adapter, with the base model as model.path"
        )
