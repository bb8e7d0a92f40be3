"""Where training stands, and the one way in which it becomes tensors and numbers and comes back from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftplus.config.schema import OptimConfig
from draftplus.diffusion.policy import History
from draftplus.distributed.sharding import is_part, part_of
from draftplus.training.optim import Ema, Parameters, load_optimizer_tensors, make_optimizer, optimizer_tensors

COUNTERS = ("step", "images", "skipped", "skipped_in_a_row")

Groups = Mapping[str, Mapping[str, Tensor]]  # "weights", "optimizer", "ema" -> tensors by name
Numbers = Mapping[str, Any]  # everything else, as JSON


@dataclass
class State:
    """Where training stands.

    step: complete steps. skipped: updates that were not finite, `skipped_in_a_row` at the end. history: each prompt's
    latest rewards, which DDPO remembers. torn: a change broke off half done, so that this is no state to continue from.
    """

    parameters: Parameters
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    images: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    history: History = field(default_factory=dict)
    torn: bool = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around what must be done as a whole."""
        self.torn = True
        yield
        self.torn = False

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters hold their moving average, where there is one."""
        return self.ema.applied(self.parameters) if self.ema else nullcontext()


def initial_state(parameters: Parameters, config: OptimConfig) -> State:
    """The state of a run that has not begun."""
    average = Ema(parameters, config.ema) if config.ema else None
    return State(parameters, make_optimizer(parameters, config), average)


def tensors_of(state: State) -> Groups:
    """The state's tensors, not copies of them."""
    groups: dict[str, Mapping[str, Tensor]] = {
        "weights": {name: parameter.detach() for name, parameter in state.parameters.items()},
        "optimizer": optimizer_tensors(state.parameters, state.optimizer),
    }
    return groups if state.ema is None else {**groups, "ema": state.ema.shadow}


def numbers_of(state: State) -> Numbers:
    """Everything else of a state."""
    counted = {name: getattr(state, name) for name in COUNTERS}
    return {**counted, "ema_updates": state.ema.updates if state.ema else 0, "history": state.history}


@torch.no_grad()
def put_back(state: State, groups: Groups, numbers: Numbers) -> None:
    """Restores what `tensors_of` and `numbers_of` gave, or nothing of it. Of sharded tensors, parts or all of them.

    Raises KeyError where anything is missing.
    """
    weights, moments = groups["weights"], groups["optimizer"]
    counted, history, updates = {name: numbers[name] for name in COUNTERS}, numbers["history"], numbers["ema_updates"]
    strangers = {name.partition("/")[2] for name in moments} - state.parameters.keys()
    if strangers:
        raise KeyError(min(strangers))
    averages = {name: groups["ema"][name] for name in state.parameters} if state.ema is not None else {}
    for name, parameter in state.parameters.items():
        parameter.copy_(part_of(parameter, weights[name]))
    state.optimizer.state.clear()
    load_optimizer_tensors(state.parameters, state.optimizer, moments)
    for name, number in counted.items():
        setattr(state, name, number)
    state.history = history
    if state.ema is not None:
        state.ema.shadow = {name: part_of(p, averages[name]).to(p) for name, p in state.parameters.items()}
        state.ema.updates = updates


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if is_part(tensor) else tensor.detach().to("cpu", copy=True)


@contextmanager
def whole_or_not(state: State) -> Iterator[None]:
    """Several updates as one: where an exception ends them, a stop or an error, the state is as it was before."""
    groups = {
        group: {name: _kept(tensor) for name, tensor in tensors.items()} for group, tensors in tensors_of(state).items()
    }
    numbers = numbers_of(state)
    try:
        yield
    except BaseException:
        put_back(state, groups, numbers)
        state.torn = False
        state.optimizer.zero_grad(set_to_none=True)
        raise
