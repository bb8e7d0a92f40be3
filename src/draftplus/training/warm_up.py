"""What `train.compile` does in a run: blocks are compiled before its first step, and as such serve its steps alone.

Compiling takes minutes, and happens when a network is first called in a new way: with gradient or without one, with its
adapters on or off, for a new size of batch. So a few steps are taken whose results are thrown away.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.problem import StepPlan
from draftplus.errors import UserError, first_line, is_out_of_memory, needs_memory
from draftplus.evaluation.chunks import chunks
from draftplus.training.ddpo import accumulate_update, experience
from draftplus.training.step import Setup, accumulate, precisely
from draftplus.types import Scores

SEARCHED = 1000  # steps of a run are looked through for those that are unlike each other


@dataclass(frozen=True)
class Brightness:
    """A scorer that stands for a run's rewards, which must not notice that they were called."""

    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        return Scores(images.flatten(1).mean(1), {})


def warm_up(setup: Setup, steps: Iterable[int]) -> None:
    """Takes one step of each kind that there is among these, and leaves everything as it was.

    Raises UserError where a block cannot be compiled.
    """
    trial = replace(setup, problem=replace(setup.problem, scorer=Brightness()), cache=None)
    for step in _unlike(setup, steps):
        try:
            with needs_memory("compiling the denoiser"):
                _pass(trial, step)
        except torch._dynamo.exc.TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"train.compile is true, but the denoiser cannot be compiled: {first_line(error)[:200]}; set "
                "train.compile=false"
            ) from error
        finally:
            for parameter in setup.problem.model.tuned.trainable().values():
                parameter.grad = None


def _unlike(setup: Setup, steps: Iterable[int]) -> list[int]:
    found: dict[Hashable, int] = {}
    for step, _ in zip(steps, range(SEARCHED), strict=False):
        found.setdefault(_kind(setup, setup.plan(step)), step)
    return list(found.values())


def _kind(setup: Setup, planned: StepPlan) -> Hashable:
    """What decides how blocks are called in a step."""
    window, sampler = planned.window, setup.problem.sampler
    end = len(sampler.schedule) if window.x0_at is None else window.x0_at + 1
    # from a window's second step on, latents carry gradient into the first block
    further = len(window.steps) > 1 and not window.detach_inputs
    between = not set(range(window.first, end)) <= set(window.steps)  # steps without gradient, in micro-batches
    return window.first > sampler.gate, further, between, bool(planned.looks), bool(planned.keep)


def _pass(setup: Setup, step: int) -> None:
    if METHODS[setup.config.objective.method].differentiates:
        accumulate(setup, step)
        return
    planned = setup.plan(step)
    with precisely(setup, planned):
        made = experience(setup, step)
        updates = chunks(len(made.places), len(made.places) // setup.config.objective.ddpo.updates)
        accumulate_update(setup, made, planned, next(updates), torch.ones(len(made.places)))


@contextmanager
def eagerly(compiled: bool) -> Iterator[None]:
    """Inside, nothing is compiled, nor are compiled blocks called: for batches of many sizes, each of which would be
    compiled by itself. compiled: whether anything is."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
