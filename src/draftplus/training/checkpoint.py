"""Full training states on disk: everything needed to continue exactly, in safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.runs.checksums import verify
from draftplus.runs.directory import saved_steps, step_name
from draftplus.runs.files import remove, whole_directory
from draftplus.training.placement import Placement
from draftplus.training.state import Groups, Numbers, State, numbers_of, put_back, tensors_of

# what reading a file with wrong bytes in it raises
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, SafetensorError)


def save(directory: Path, state: State, keep: int, placement: Placement, here: World) -> None:
    """Writes `directory`/step-…, whole or not at all, and removes all but the newest `keep`. Every process calls it.

    Raises UserError where the disk is full.
    """
    with ExitStack() as stack:
        whole = whole_directory(directory / step_name(state.step), checksums=True)
        target = stack.enter_context(whole) if here.is_main else None
        for group, tensors in tensors_of(state).items():
            gathered = placement.gather(tensors)
            if target is not None and gathered is not None:
                on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in gathered.items()}
                save_file(on_cpu, target / f"{group}.safetensors")
        if target is not None:
            (target / "state.json").write_text(json.dumps(numbers_of(state)), encoding="utf-8")
    if here.is_main:
        for step in saved_steps(directory)[:-keep]:
            remove(directory / step_name(step))


def restore(directory: Path, state: State, placement: Placement) -> bool:
    """Restores the newest state below `directory`; False where there is none.

    Raises UserError where it is damaged or does not fit the model.
    """
    steps = saved_steps(directory)
    if not steps:
        return False
    source = directory / step_name(steps[-1])
    shapes = {name: tuple(p.shape) for name, p in state.parameters.items()}
    try:
        groups, numbers = _read(source, tensors_of(state))
        if {name: tuple(tensor.shape) for name, tensor in groups["weights"].items()} != shapes:
            raise UserError(f"{source}: its weights do not fit the model of this configuration")
        put_back(state, groups, numbers, placement.scatter)
    except PermissionError as error:
        raise UserError(f"{error.filename or source}: {error.strerror}; the checkpoint cannot be read") from None
    except DAMAGED as error:
        raise UserError(f"{source}: damaged ({error}); {_remedy(directory, steps)}") from None
    return True


def _read(source: Path, groups: Iterable[str]) -> tuple[Groups, Numbers]:
    """A checkpoint's tensors and numbers. Raises one of DAMAGED where it is not what was written."""
    verify(source)
    step, numbers = int(source.name[5:]), json.loads((source / "state.json").read_text(encoding="utf-8"))
    if numbers["step"] != step:
        raise ValueError(f"state.json is of step {numbers['step']}")
    return {group: load_file(source / f"{group}.safetensors") for group in groups}, numbers


def _remedy(directory: Path, steps: Sequence[int]) -> str:
    for step in reversed(steps[:-1]):
        source = directory / step_name(step)
        try:
            _read(source, [path.stem for path in source.glob("*.safetensors")])
        except DAMAGED:
            continue
        worse = " and ".join(str(directory / step_name(later)) for later in steps if later > step)
        return f"remove {worse} to continue from step {step}, whose checkpoint is whole"
    return "no other checkpoint is whole; put back a copy of it, or start again with another name="
