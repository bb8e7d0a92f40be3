"""How many steps and how large micro-batches a configuration means; known before any model is loaded."""

from __future__ import annotations

from draftplus.config import Config
from draftplus.data.batches import check_batch_sizes, steps_of_epochs
from draftplus.diffusion.methods import METHODS
from draftplus.errors import UserError
from draftplus.rewards.names import compares_images


def total_steps(config: Config, prompts: int) -> int:
    """Optimizer steps of a run over this many training prompts; `train.epochs` decides if it is set."""
    if config.train.epochs is not None:
        size, per_prompt = config.train.global_batch_size, config.data.images_per_prompt
        return steps_of_epochs(config.train.epochs, prompts, size, per_prompt)
    assert config.train.steps is not None
    return config.train.steps


def micro_batch_size(config: Config, ranks: int) -> int:
    """Images per backward pass: `train.micro_batch_size`, or a rank's whole share of an update if that is smaller.

    Raises UserError if ranks, DDPO's updates or micro-batches do not divide the batch, or a rank's share is too
    small for a reward that compares the images of a micro-batch.
    """
    sizes, objective = config.train, config.objective
    share = sizes.global_batch_size // ranks
    comparing = [name for name in config.reward if compares_images([name])]
    if comparing and share < min(sizes.micro_batch_size, sizes.global_batch_size):
        raise UserError(
            f"reward '{comparing[0]}' compares the train.micro_batch_size={sizes.micro_batch_size} images of a "
            f"micro-batch, but each of {ranks} processes has {share}; set "
            f"train.micro_batch_size={max(1, share)}"
        )
    updates = 1 if METHODS[objective.method].differentiates else objective.ddpo.updates
    micro = min(sizes.micro_batch_size, max(1, sizes.global_batch_size // (ranks * updates)))
    check_batch_sizes(sizes.global_batch_size, micro, config.data.images_per_prompt, ranks, updates)
    return micro
