"""Reading weights from strangers: safetensors, or a pickle that contains nothing but tensors, also in a `.nemo` file.

Such a file is a tar of `model_config.yaml` and `model_weights.ckpt`, the latter once for each process where it was
saved under tensor parallelism.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from draftplus.config import read_yaml
from draftplus.errors import UserError, first_line

POINTER = b"version https://git-lfs"  # how the small file begins that stands for one which was not fetched
# whose classes checkpoints name: trainers', and the configurations beside the weights, with what these are made of
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
PLAIN = ("typing.Any", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.int")
NEMO_CONFIG, NEMO_WEIGHTS = "model_config.yaml", "model_weights.ckpt"
NEMO_WHOLE = (
    f"; in NeMo, restore it on one GPU with tensor_model_parallel_size=1 and pipeline_model_parallel_size=1, "
    f"torch.save(model.state_dict(), '{NEMO_WEIGHTS}'), and pack that file with {NEMO_CONFIG} into a tar"
)


class _ReadPast:
    """What stands for such a class: nothing of it is imported or run, and what it held is dropped."""

    def __new__(cls, *args: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()  # which the unpickler fills, whether the class kept attributes or was a dictionary


def read_state_dict(path: Path, tensors_only: bool = False) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pt, .pth, .bin or .nemo file; a `state_dict` inside is unwrapped.

    Raises UserError for a file that is damaged, a pickle that would need to run code, a .nemo file of several
    processes, or with `tensors_only` one in which something else has a name beside them.
    """
    refuse_pointer(path)
    if path.suffix == ".nemo":
        with unpacked_nemo(path) as (_, parts):
            if len(parts) > 1:
                raise UserError(f"{path} is divided among {len(parts)} processes (mp_rank_…){NEMO_WHOLE}")
            return read_nemo_part(path, parts[0])
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


def sort_metadata(path: Path) -> None:
    """Puts what a .safetensors file says of itself in the order of its keys; safetensors writes any order.

    So the same weights are the same bytes. The file must say something; it keeps its length.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


@contextmanager
def unpacked_nemo(file: Path) -> Iterator[tuple[dict[str, Any], list[Path]]]:
    """The configuration in a .nemo file, and for as long as the context lasts its files of weights, one for each
    process of tensor parallelism, for `read_nemo_part`.

    Raises UserError for a file that is missing or damaged, or one that only NeMo can read.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    with tempfile.TemporaryDirectory() as directory:
        wanted = _extracted(file, Path(directory))
        with _named(file, Path(directory) / NEMO_CONFIG):
            config = read_yaml(Path(directory) / NEMO_CONFIG, literally=True)
        yield config, [Path(directory) / name for name in wanted]


def read_nemo_part(file: Path, part: Path) -> dict[str, Tensor]:
    """The tensors of one of the files of weights out of a .nemo file. Raises UserError, which names the latter."""
    with _named(file, part):
        return read_state_dict(part)


@contextmanager
def _named(file: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(part), f"{file}, {part.name} in it")) from None


def _extracted(file: Path, directory: Path) -> list[str]:
    """Unpacks the configuration and the weights; the names of the latter's files."""
    try:
        with tarfile.open(file) as tar:
            members = {os.path.normpath(member.name): member for member in tar}
            wanted = _weights_in(file, members)
            for name in [NEMO_CONFIG, *wanted]:
                source = tar.extractfile(members[name])
                if source is None:
                    raise UserError(f"{file}: {name} in it is not a file, but a folder or a link")
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                with (directory / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**24)
    except (tarfile.TarError, EOFError, zlib.error, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the file
            raise
        raise UserError(
            f"{file}: damaged, or not a .nemo file, which is a tar with {NEMO_CONFIG} and {NEMO_WEIGHTS}: "
            f"{first_line(error)}"
        ) from None
    return wanted


def _weights_in(file: Path, members: Collection[str]) -> list[str]:
    if NEMO_CONFIG not in members:
        raise UserError(f"{file}: not a .nemo file: it has no {NEMO_CONFIG}")
    if NEMO_WEIGHTS in members:
        return [NEMO_WEIGHTS]
    parts = sorted(name for name in members if re.fullmatch(rf"mp_rank_\d+/{re.escape(NEMO_WEIGHTS)}", name))
    if parts:
        return parts
    if any(name.startswith("tp_rank_") for name in members):
        raise UserError(f"{file} is divided for pipeline parallelism (tp_rank_…_pp_rank_…){NEMO_WHOLE}")
    if any(name.startswith("model_weights/") for name in members):
        raise UserError(f"{file} holds a distributed checkpoint (model_weights/), which only NeMo reads{NEMO_WHOLE}")
    raise UserError(f"{file}: not a .nemo file of one model: it has no {NEMO_WEIGHTS}")


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
    return [name for name in named if name.startswith(TRAINERS) or name in PLAIN]
