"""Full training states: everything needed to continue exactly, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus.diffusion.policy import History
from draftplus.errors import UserError
from draftplus.runs.directory import saved_steps, step_name
from draftplus.runs.files import whole_directory
from draftplus.training.optim import Ema, Parameters, load_optimizer_tensors, optimizer_tensors


@dataclass
class State:
    """Where training stands.

    step: complete steps. skipped: updates that were not finite, `skipped_in_a_row` at the end. history: each prompt's
    latest rewards, which DDPO remembers.
    """

    parameters: Parameters
    optimizer: torch.optim.AdamW
    ema: Ema | None
    step: int = 0
    images: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    history: History = field(default_factory=dict)
    counters: tuple[str, ...] = field(default=("step", "images", "skipped", "skipped_in_a_row"), repr=False)


def save(directory: Path, state: State, keep: int) -> None:
    """Writes `directory`/step-…, whole or not at all, and removes all but the newest `keep`.

    Raises UserError where the disk is full.
    """
    with whole_directory(directory / step_name(state.step)) as target:
        _write(target / "weights.safetensors", {name: p.detach() for name, p in state.parameters.items()})
        _write(target / "optimizer.safetensors", optimizer_tensors(state.parameters, state.optimizer))
        if state.ema is not None:
            _write(target / "ema.safetensors", state.ema.shadow)
        numbers = {name: getattr(state, name) for name in state.counters}
        numbers["ema_updates"] = state.ema.updates if state.ema else 0
        (target / "state.json").write_text(json.dumps({**numbers, "history": state.history}), encoding="utf-8")
    for step in saved_steps(directory)[:-keep]:
        shutil.rmtree(directory / step_name(step))


def restore(directory: Path, state: State) -> bool:
    """Restores the newest complete state below `directory`; False where there is none.

    Raises UserError where it is damaged or does not fit the model.
    """
    steps = saved_steps(directory)
    if not steps:
        return False
    source = directory / step_name(steps[-1])
    try:
        weights = load_file(source / "weights.safetensors")
        moments = load_file(source / "optimizer.safetensors")
        averages = load_file(source / "ema.safetensors") if state.ema is not None else {}
        numbers = json.loads((source / "state.json").read_text(encoding="utf-8"))
        history, updates = numbers["history"], numbers["ema_updates"]
        counted = {name: numbers[name] for name in state.counters}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{source}: damaged ({error}); remove it to continue from the previous checkpoint, if there is one"
        ) from None
    fitting = {name: tuple(p.shape) for name, p in state.parameters.items()}
    if {name: tuple(t.shape) for name, t in weights.items()} != fitting:
        raise UserError(f"{source}: its weights do not fit the model of this configuration")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            parameter.copy_(weights[name])
    load_optimizer_tensors(state.parameters, state.optimizer, moments)
    for name, number in counted.items():
        setattr(state, name, number)
    state.history = history
    if state.ema is not None:
        state.ema.shadow = {name: averages[name].to(p) for name, p in state.parameters.items()}
        state.ema.updates = updates
    return True


@contextmanager
def whole_or_not(state: State) -> Iterator[None]:
    """Several updates as one: where an exception ends them, a stop or an error, the state is as it was before."""
    weights = {name: p.detach().cpu().clone() for name, p in state.parameters.items()}
    moments = {
        name: tensor.cpu().clone() for name, tensor in optimizer_tensors(state.parameters, state.optimizer).items()
    }
    averages = {name: tensor.cpu().clone() for name, tensor in state.ema.shadow.items()} if state.ema else {}
    numbers = {name: getattr(state, name) for name in state.counters}
    updates = state.ema.updates if state.ema else 0
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(weights[name])
        state.optimizer.state.clear()
        load_optimizer_tensors(state.parameters, state.optimizer, moments)
        state.optimizer.zero_grad(set_to_none=True)
        for name, number in numbers.items():
            setattr(state, name, number)
        if state.ema is not None:
            state.ema.shadow = {name: averages[name].to(p) for name, p in state.parameters.items()}
            state.ema.updates = updates
        raise


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
