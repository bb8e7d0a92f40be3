"""Reading weights from strangers: safetensors, or a pickle that contains nothing but tensors."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from draftplus.errors import UserError

POINTER = b"version https://git-lfs"  # how the small file begins that stands for one which was not fetched
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.")  # whose checkpoints name some of their classes


class _ReadPast:
    """What stands for a trainer's class: nothing of that class is imported or run, and what it held is dropped."""

    def __new__(cls, *args: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()  # which the unpickler fills, whether the class kept attributes or was a dictionary


def read_state_dict(path: Path, tensors_only: bool = False) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt, .pth or .bin file; a `state_dict` inside is unwrapped.

    Raises UserError for a file that is damaged, a pickle that would need to run code, or with `tensors_only` one in
    which something else has a name beside them.
    """
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None
    loaded = _unpickled(path)
    while isinstance(loaded, dict) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected tensors by name, found {type(loaded).__name__}")
    other = next((name for name, value in loaded.items() if not isinstance(value, Tensor)), None)
    if tensors_only and other is not None:
        raise UserError(f"{path}: '{other}' is a {type(loaded[other]).__name__} where a tensor is expected")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def read_header(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a .safetensors file without their values, on the meta device, and what the file says of itself.

    Raises UserError for a file that is damaged.
    """
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file: {error}") from None


def refuse_pointer(path: Path) -> None:
    """UserError for a file that only says where the weights are, as a clone without Git LFS leaves it."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path}: a pointer to a large file, not the weights; fetch them with: git lfs pull")


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(_ReadPast, name) for name in _classes_of_trainers(path)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: rejected: this pickle is damaged, or loading it would run code, which could do anything. "
            "If you trust it, convert it to .safetensors"
        ) from None
    except Exception as error:  # the bytes of a damaged pickle are instructions, which fail in any way
        raise UserError(f"{path}: damaged or not a PyTorch file: {first_line(error)}") from None


def _classes_of_trainers(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):  # older than Lightning's habit
        return []
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [name for name in named if name.startswith(TRAINERS)]


def first_line(error: Exception) -> str:
    """The message of an error in one line, with the first detail if that line only announces details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
