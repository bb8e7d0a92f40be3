"""Reading weights from strangers: safetensors, or a pickle that contains nothing but tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draftplus.errors import UserError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt, .pth or .bin file; a `state_dict` inside is unwrapped.

    Raises UserError for a file that is damaged, or a pickle that would need to run code.
    """
    if path.is_file():
        path.open("rb").close()  # one that may not be read raises here, rather than being called damaged
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: rejected: this pickle is damaged, or loading it would run code, which could do anything. "
            "If you trust it, convert it to .safetensors"
        ) from None
    except Exception as error:  # the bytes of a damaged pickle are instructions, which fail in any way
        raise UserError(f"{path}: damaged or not a PyTorch file: {first_line(error)}") from None
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(inner, dict):
        raise UserError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    return {name: tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}


def refuse_code(directory: Path) -> None:
    """Checks that every pickle in a model directory that would be loaded contains only tensors.

    Raises UserError that names the first that does not.
    """
    for file in sorted(directory.rglob("*.bin")):
        preferred = file.name.split(".")[0].removeprefix("pytorch_")  # pytorch_model.bin, model.safetensors
        if not any(file.parent.glob(f"{preferred}*.safetensors")):
            read_state_dict(file)


def first_line(error: Exception) -> str:
    """The message of an error in one line, with the first detail if that line only announces details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
