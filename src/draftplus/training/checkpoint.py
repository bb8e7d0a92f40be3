"""Full training states on disk: everything needed to continue exactly, in safetensors and JSON.

Tensors that every process has whole are written by the main one, a file for each group. Of a sharded model, every
process writes and reads its parts: PyTorch's distributed checkpoint, in files of safetensors, without its pickle of
metadata. Each kind of checkpoint is continued by any number of processes, sharded or not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from draftplus.distributed import World
from draftplus.distributed.sharding import is_part
from draftplus.errors import UserError
from draftplus.runs.checksums import verify
from draftplus.runs.directory import saved_steps, step_name
from draftplus.runs.files import BUILDING, beside, remove, whole_directory
from draftplus.training.state import Groups, Numbers, State, numbers_of, put_back, tensors_of

PARTS = "shard-*.safetensors"  # PyTorch's names of files of parts

# what reading a file with wrong bytes in it raises
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, SafetensorError)


def save(directory: Path, state: State, keep: int, here: World) -> None:
    """Writes `directory`/step-…, whole or not at all, and removes all but the newest `keep`. Every process calls it.

    Raises UserError where the disk is full.
    """
    target, groups = directory / step_name(state.step), tensors_of(state)
    parts = any(map(is_part, groups["weights"].values()))
    with whole_directory(target, checksums=True) if here.is_main else nullcontext(beside(target, BUILDING)) as building:
        if parts:
            here.barrier()  # until the directory is there
            with _one_error():
                writer = HuggingFaceStorageWriter(str(building), save_distributed=True)
                state_dict_saver.save(_named(groups), storage_writer=writer)
        if here.is_main:
            for group, tensors in groups.items() if not parts else ():
                on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(on_cpu, building / f"{group}.safetensors")
            (building / "state.json").write_text(json.dumps(numbers_of(state)), encoding="utf-8")
    if here.is_main:
        for step in saved_steps(directory)[:-keep]:
            remove(directory / step_name(step))


def restore(directory: Path, state: State) -> bool:
    """Restores the newest state below `directory`; False where there is none.

    Raises UserError where it is damaged or does not fit the model.
    """
    steps = saved_steps(directory)
    if not steps:
        return False
    source = directory / step_name(steps[-1])
    shapes = {name: tuple(p.shape) for name, p in state.parameters.items()}
    try:
        groups, numbers = _read(source, tensors_of(state), state.parameters)
        if {name: tuple(tensor.shape) for name, tensor in groups["weights"].items()} != shapes:
            raise UserError(f"{source}: its weights do not fit the model of this configuration")
        put_back(state, groups, numbers)
    except PermissionError as error:
        raise UserError(f"{error.filename or source}: {error.strerror}; the checkpoint cannot be read") from None
    except DAMAGED as error:
        raise UserError(f"{source}: damaged ({error}); {_remedy(directory, steps, tensors_of(state))}") from None
    return True


def _read(source: Path, groups: Iterable[str], parameters: Mapping[str, Tensor]) -> tuple[Groups, Numbers]:
    """A checkpoint's tensors, or this process's parts of those that are sharded as its parameters are, and its numbers.

    Raises one of DAMAGED where it is not what was written.
    """
    verify(source)
    step, numbers = int(source.name[5:]), json.loads((source / "state.json").read_text(encoding="utf-8"))
    if numbers["step"] != step:
        raise ValueError(f"state.json is of step {numbers['step']}")
    if not any(source.glob(PARTS)):
        return {group: load_file(source / f"{group}.safetensors") for group in groups}, numbers
    reader = HuggingFaceStorageReader(str(source))
    found: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for key, told in reader.read_metadata().state_dict_metadata.items():
        group, _, name = key.partition("/")
        parameter = parameters.get(name.rpartition("/")[2])  # in which the name of an optimizer's tensor ends
        found[group][name] = _room(told, parameter)
    with _one_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no other process is asked, which is how it is meant
        state_dict_loader.load(_named(found), storage_reader=reader, no_dist=True)
    return found, numbers


def _room(told: Any, parameter: Tensor | None) -> Tensor:
    size, dtype = told.size, told.properties.dtype
    if parameter is not None and is_part(parameter) and parameter.shape == size:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(size, dtype=dtype)


def _named(groups: Groups) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


@contextmanager
def _one_error() -> Iterator[None]:
    """The first error of those that the processes had; PyTorch's exception of all of them is none of Exception's."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def _remedy(directory: Path, steps: Sequence[int], groups: Iterable[str]) -> str:
    for step in reversed(steps[:-1]):
        source = directory / step_name(step)
        try:
            _read(source, groups, {})
        except DAMAGED:
            continue
        worse = " and ".join(str(directory / step_name(later)) for later in steps if later > step)
        return f"remove {worse} to continue from step {step}, whose checkpoint is whole"
    return "no other checkpoint is whole; put back a copy of it, or start again with another name="
