"""The one loop over timesteps. Where gradient flows is the window's to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from draftplus.diffusion.guidance import Denoise
from draftplus.diffusion.schedule import Denoised, Schedule, denoised
from draftplus.diffusion.solvers import Noise, Solver
from draftplus.diffusion.window import Window

NO_GRADIENT = Window(())


class Visit(NamedTuple):
    """A step that carried gradient: its number, its latents (b, c, h, w) and what was predicted there."""

    step: int
    latents: Tensor
    now: Denoised


@dataclass
class Rollout:
    """Where a trajectory stands.

    latents: (b, c, h, w), the image's latents once the last step is done. previous: the x0 predicted last, which a
    multistep solver remembers. visits: the steps that carried gradient.
    """

    latents: Tensor
    previous: Tensor | None = None
    visits: list[Visit] = field(default_factory=list)

    def rows(self, index: slice) -> Rollout:
        """Some of the batch, without its visits."""
        return Rollout(self.latents[index], None if self.previous is None else self.previous[index])

    @staticmethod
    def concatenate(parts: Sequence[Rollout]) -> Rollout:
        """The batches of all parts, in order, without their visits."""
        previous = [part.previous for part in parts if part.previous is not None]
        return Rollout(torch.cat([part.latents for part in parts]), torch.cat(previous) if previous else None)


def sample(
    denoise: Denoise,
    start: Rollout,
    schedule: Schedule,
    solver: Solver,
    window: Window = NO_GRADIENT,
    begin: int = 0,
    end: int | None = None,
    noise: Noise | None = None,
) -> Rollout:
    """Takes the steps begin … end - 1 from `start`, with gradient in the window's steps alone.

    noise: the fresh noise (b, c, h, w) of a step, for solvers with eta > 0. Nothing carries gradient under
    torch.no_grad(), whatever the window says.
    """
    x, previous = start.latents, start.previous
    visits: list[Visit] = []
    for index in range(begin, len(schedule) if end is None else end):
        carries = index in window.steps and torch.is_grad_enabled()
        with torch.set_grad_enabled(carries):
            raw = denoise(x.detach() if window.detach_inputs else x, schedule.timestep(index, x.device))
        now = denoised(raw, x, schedule.steps[index], schedule.prediction)
        if carries:
            visits.append(Visit(index, x, now))
        if index == window.x0_at:
            return Rollout(now.x0, now.x0, visits)
        x = solver(schedule, index, x, now, previous, noise)
        previous = now.x0
    return Rollout(x, previous, visits)
