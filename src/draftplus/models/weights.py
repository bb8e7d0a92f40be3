"""Reading weights that strangers made: safetensors, or a pickle that holds nothing but tensors."""

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
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused: this pickle needs to run code to load, which could do anything. "
            "Convert it to .safetensors where you trust it"
        ) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole PyTorch file: {str(error).splitlines()[0]}") from None
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(inner, dict):
        raise UserError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    return {name: tensor for name, tensor in inner.items() if isinstance(tensor, Tensor)}


def refuse_code(directory: Path) -> None:
    """Checks that every pickle in a model directory that would be loaded holds tensors alone.

    Raises UserError naming the first that does not.
    """
    for file in sorted(directory.rglob("*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            read_state_dict(file)
