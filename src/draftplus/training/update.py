"""One update of the weights from the gradients that are there; one that is not finite is skipped and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping

from draftplus.config.schema import OptimConfig
from draftplus.diffusion.overflow import Overflow
from draftplus.errors import UserError, needs_memory
from draftplus.runs.rows import reward_names
from draftplus.training.optim import gradient_norm, learning_rate, parameter_norm
from draftplus.training.state import State

MOST_SKIPPED_IN_A_ROW = 10
MEND = "lower optim.lr, or use model.dtype=float32"
ROUNDING = 1e-7  # of the weights' norm; a smaller gradient at the first step is float32's rounding, not the loss's


def update(
    state: State, config: OptimConfig, means: Mapping[str, float], learns: bool = True, mend: str = MEND
) -> float:  # fmt: skip
    """Moves the weights, and their average where there is one, and empties the gradients. Returns the gradient's norm.

    means: the numbers of this update, `loss` among them. learns: False where the loss may rightly have no gradient.
    mend: what to do about numbers that are not finite.
    Raises UserError for numbers that are not finite at the first step, or ten times in a row, and for a gradient that
    is none at the first step: Adam would make updates of full size of its rounding.
    """
    norm = gradient_norm(state.parameters, config.grad_clip)
    if learns and state.step == 0 and norm <= ROUNDING * (weights := parameter_norm(state.parameters)):
        raise UserError(
            f"the gradient of the first step has norm {norm:.1e}, which is nothing but rounding for weights of norm "
            f"{weights:.1e}: the rewards do not depend on what is trained. See that they change with the images and "
            "have a weight, that images are not all black or white, and that model.dtype does not underflow (float16)"
        )
    if math.isfinite(norm) and math.isfinite(means["loss"]):
        with state.changing():
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(config, state.step)
            with needs_memory("the optimizer's update"):
                state.optimizer.step()
            if state.ema is not None:
                state.ema.update(state.parameters)
            state.skipped_in_a_row = 0
    else:
        skip(state, means, norm, mend)
    state.optimizer.zero_grad(set_to_none=True)
    return norm


def skip(state: State, means: Mapping[str, float], norm: float, mend: str = MEND) -> None:
    """Counts an update that is not made. Raises as `update` does, and then counts nothing: its step is done again."""
    if state.step > 0 and state.skipped_in_a_row + 1 < MOST_SKIPPED_IN_A_ROW:
        state.skipped += 1
        state.skipped_in_a_row += 1
        return
    bad = [name for name, value in {**means, "grad_norm": norm}.items() if not math.isfinite(value)]
    rewards = reward_names(bad)
    at = f"(step {state.step + 1})"
    when = "at the first step" if state.step == 0 else f"in {MOST_SKIPPED_IN_A_ROW} updates in a row"
    if "clipped_fraction" in bad:  # without an image there is no reward to blame
        raise Overflow(f"the images are not finite {when} {at}; use model.dtype=float32. This step was discarded")
    what = f"reward '{rewards[0]}' is" if rewards else f"{', '.join(bad)} is"
    remedy = "check what it returns for images in [0, 1]" if rewards else mend
    raise UserError(f"{what} not finite {when} {at}; {remedy}. This step was discarded")
