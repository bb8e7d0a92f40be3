"""What `draftplus train` and `draftplus reward train` do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from torch.nn.attention import SDPBackend, sdpa_kernel

from draftplus.config import Config, RewardTrainConfig
from draftplus.distributed import world
from draftplus.runs.directory import REWARDS, locked
from draftplus.training.drive import drive
from draftplus.training.fine_tuning import fine_tuning
from draftplus.training.placement import make_placement
from draftplus.training.preference import preference

# without that of cuDNN, whose gradient is NaN under gradient checkpointing (FLUX.1 in bfloat16, torch 2.11, H200)
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def train(config: Config, run: Path, told: Callable[[Path], None] | None = None) -> Path:
    """Trains as the configuration says, or continues, in the run directory `run`. Returns it.

    told: called with the run after each evaluation, on the main process.

    Raises UserError for a user's mistake, and Interrupted, once the last complete step is saved, where the process is
    asked to stop.
    """
    with world(config.device) as here:
        placement = make_placement(config.parallel, here)
        with locked(run) if here.is_main else nullcontext(), sdpa_kernel(ATTENTION):
            task = fine_tuning(config, run, placement, here)
            drive(task, config, run, here, told)
    return run


def train_reward(config: RewardTrainConfig, run: Path, told: Callable[[Path], None] | None = None) -> Path:
    """Trains a reward on preference pairs, or continues, as `train` does a diffusion model."""
    with world(config.device) as here:
        placement = make_placement(config.parallel, here)
        with locked(run) if here.is_main else nullcontext():
            task = preference(config, run, placement, here)
            drive(task, config, run, here, told, REWARDS)
    return run
