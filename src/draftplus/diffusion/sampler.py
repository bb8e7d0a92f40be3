"""The one loop over timesteps, and all that it takes to sample a model. Where gradient flows is the window's to say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from draftplus.diffusion.guidance import Denoise, denoiser
from draftplus.diffusion.schedule import Denoised, Schedule
from draftplus.diffusion.solvers import Solver, StepNoise
from draftplus.diffusion.window import NO_GRADIENT, Window
from draftplus.errors import needs_memory
from draftplus.types import Conditioning, Model, Raw


class Visit(NamedTuple):
    """A step that a penalty looks at: its number, its latents (b, c, h, w), and what was predicted there.

    now: None where the step was taken without gradient, so that nothing is to be learned from its prediction.
    """

    step: int
    latents: Tensor
    now: Denoised | None


@dataclass
class Rollout:
    """Where a trajectory stands.

    latents: (b, c, h, w), the image's latents once the last step is done. previous: the x0 predicted last, which a
    multistep solver remembers. visits: the steps that carried gradient. kept: the latents of further steps that were
    asked for, by step, without gradient.
    """

    latents: Tensor
    previous: Tensor | None = None
    visits: list[Visit] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, index: slice) -> Rollout:
        """Some of the batch, without its visits."""
        kept = {step: latents[index] for step, latents in self.kept.items()}
        return Rollout(self.latents[index], None if self.previous is None else self.previous[index], kept=kept)

    @staticmethod
    def concatenate(parts: Sequence[Rollout]) -> Rollout:
        """The batches of all parts, in order, without their visits."""
        previous = [part.previous for part in parts if part.previous is not None]
        kept = {step: torch.cat([part.kept[step] for part in parts]) for step in parts[0].kept}
        return Rollout(
            torch.cat([part.latents for part in parts]), torch.cat(previous) if previous else None, kept=kept
        )


def sample(
    denoise: Denoise,
    start: Rollout,
    schedule: Schedule,
    solver: Solver,
    window: Window = NO_GRADIENT,
    begin: int = 0,
    end: int | None = None,
    noise: StepNoise | None = None,
    keep: Collection[int] = (),
) -> Rollout:
    """Takes the steps begin … end - 1 from `start`.

    window: that of `denoise`; its steps are the rollout's visits. noise: the fresh noise (b, c, h, w) of a step, for
    solvers with eta > 0. keep: further steps whose latents the rollout remembers. Nothing carries gradient under
    torch.no_grad(), whatever the window says.
    """
    x, previous = start.latents, start.previous
    visits: list[Visit] = []
    kept = dict(start.kept)
    for index in range(begin, len(schedule) if end is None else end):
        now = denoise(x, index)
        if index in window.steps and torch.is_grad_enabled():
            visits.append(Visit(index, x, now))
        elif index in keep:
            kept[index] = x.detach()
        if index == window.x0_at:
            return Rollout(now.x0, now.x0, visits, kept)
        x = solver(schedule, index, x, now, previous, noise)
        previous = now.x0
    return Rollout(x, previous, visits, kept)


@dataclass(frozen=True)
class Sampler:
    """How a model is sampled: what `generate` and training have in common.

    negative_prompt: None is what the family's stock pipeline takes where none is given. eta: the solver's, which DDPO's
    probabilities depend on. gate: how many of the first steps the frozen model draws.
    """

    model: Model
    schedule: Schedule
    solver: Solver
    guidance_scale: float
    negative_prompt: str | None = None
    eta: float = 0.0
    gate: int = 0

    def start(self, noise: Tensor) -> Rollout:
        """Where a trajectory starts. noise: (b, c, h, w), standard normal."""
        return Rollout(noise * self.schedule.start)

    def denoiser(self, conditioning: Conditioning, window: Window | None = None) -> Denoise:
        """The guided denoiser of b prompts; with gradient in the window's steps, without one wherever it is enabled."""
        return denoiser(self.guided(conditioning), self.schedule, window)

    def frozen(self, conditioning: Conditioning) -> Denoise:
        """The guided denoiser of the frozen model, whose network never carries gradient."""
        raw = self.guided(conditioning)

        def reference(x: Tensor, timestep: Tensor) -> Tensor:
            with self.model.tuned.reference():
                return raw(x, timestep)

        return denoiser(reference, self.schedule, NO_GRADIENT)

    def drawing(self, conditioning: Conditioning, window: Window | None = None) -> Denoise:
        """What draws a trajectory: the frozen model before the gate, and `denoiser` from there on."""
        trained = self.denoiser(conditioning, window)
        if not self.gate:
            return trained
        frozen = self.frozen(conditioning)
        return lambda x, index: (frozen if index < self.gate else trained)(x, index)

    def sample(
        self,
        conditioning: Conditioning,
        start: Rollout,
        window: Window = NO_GRADIENT,
        begin: int = 0,
        end: int | None = None,
        noise: StepNoise | None = None,
        keep: Collection[int] = (),
    ) -> Rollout:
        """`sample` by what draws b prompts."""
        denoise = self.drawing(conditioning, window)
        return sample(denoise, start, self.schedule, self.solver, window, begin, end, noise, keep)

    def guided(self, conditioning: Conditioning) -> Raw:
        """The guided prediction of b prompts, in the precision of the latents that it is given or a higher one."""
        raw = self.model.guided(conditioning, self.negative_prompt, self.guidance_scale)

        def told(x: Tensor, timestep: Tensor) -> Tensor:
            with needs_memory(f"a pass of the denoiser over {len(x)} images"):
                return raw(x, timestep)

        return told
