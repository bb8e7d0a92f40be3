"""Full training states on disk: everything needed to continue exactly, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.runs.directory import saved_steps, step_name
from draftplus.runs.files import whole_directory
from draftplus.training.placement import Placement
from draftplus.training.state import State, numbers_of, put_back, tensors_of


def save(directory: Path, state: State, keep: int, placement: Placement, here: World) -> None:
    """Writes `directory`/step-…, whole or not at all, and removes all but the newest `keep`. Every process calls it.

    Raises UserError where the disk is full.
    """
    with ExitStack() as stack:
        target = stack.enter_context(whole_directory(directory / step_name(state.step))) if here.is_main else None
        for group, tensors in tensors_of(state).items():
            whole = placement.gather(tensors)
            if target is not None and whole is not None:
                on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in whole.items()}
                save_file(on_cpu, target / f"{group}.safetensors")
        if target is not None:
            (target / "state.json").write_text(json.dumps(numbers_of(state)), encoding="utf-8")
    if here.is_main:
        for step in saved_steps(directory)[:-keep]:
            shutil.rmtree(directory / step_name(step))


def restore(directory: Path, state: State, placement: Placement) -> bool:
    """Restores the newest complete state below `directory`; False where there is none.

    Raises UserError where it is damaged or does not fit the model.
    """
    steps = saved_steps(directory)
    if not steps:
        return False
    source = directory / step_name(steps[-1])
    shapes = {name: tuple(p.shape) for name, p in state.parameters.items()}
    try:
        groups = {group: load_file(source / f"{group}.safetensors") for group in tensors_of(state)}
        numbers = json.loads((source / "state.json").read_text(encoding="utf-8"))
        if {name: tuple(tensor.shape) for name, tensor in groups["weights"].items()} != shapes:
            raise UserError(f"{source}: its weights do not fit the model of this configuration")
        put_back(state, groups, numbers, placement.scatter)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{source}: damaged ({error}); remove it to continue from the previous checkpoint, if there is one"
        ) from None
    return True
