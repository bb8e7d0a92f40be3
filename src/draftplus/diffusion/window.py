"""Windows: which solver steps carry gradient, as a value.

The sampler takes a window as an argument; the methods of the family differ in little more than their windows. Steps
are counted from 0 at pure noise to T - 1 at the image.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """steps: indices, ascending, that carry gradient into the denoiser's weights.

    detach_inputs: cut the gradient at the denoiser's input, so that it flows between steps only through the solver's
    linear terms (DRTune). x0_at: end the trajectory at this step and take its prediction of x0 as the result (ReFL).
    """

    steps: tuple[int, ...]
    detach_inputs: bool = False
    x0_at: int | None = None

    @property
    def first(self) -> int:
        """The first step with gradient; all steps before it are plain inference."""
        return self.steps[0]


NO_GRADIENT = Window(())


def last(k: int, total: int) -> Window:
    """The last k of `total` steps: DRaFT-K, and DRaFT for k = total (Clark et al. 2023, arXiv 2309.17400)."""
    return Window(tuple(range(total - k, total)))


def single(index: int) -> Window:
    """One step, whose one-step prediction of x0 is scored: ReFL (Xu et al. 2023, arXiv 2304.05977, algorithm 1)."""
    return Window((index,), x0_at=index)


def spaced(k: int, total: int, offset: int, skipped: int, gate: int = 0) -> Window:
    """k evenly spaced steps with detached inputs: DRTune (Wu et al. 2024, arXiv 2405.00760, algorithm 1).

    offset: in [0, (total - gate) // k), where in each stretch of as many steps the trained one lies. skipped: how many
    of the last steps are left out; the trajectory then ends with the prediction of x0 at the step before them. gate:
    how many of the first steps are not trained.
    """
    end = total - skipped
    stride = (total - gate) // k
    steps = tuple(i for i in range(total - k * stride + offset, total, stride) if i < end)
    return Window(steps or (end - 1,), detach_inputs=True, x0_at=end - 1 if skipped else None)
