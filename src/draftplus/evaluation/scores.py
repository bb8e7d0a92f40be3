"""Scores of finished images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from draftplus.evaluation.chunks import SAMPLING_BATCH, chunks
from draftplus.rewards.combined import Combined
from draftplus.types import Reward

Rewards = Mapping[str, Reward]


@torch.no_grad()
def score_images(
    rewards: Rewards, images: Tensor, prompts: Sequence[str], device: torch.device, size: int = SAMPLING_BATCH
) -> dict[str, Tensor]:
    """Each reward's scores of n images (n, 3, H, W) in [0, 1] against their n prompts, (n,) float32 on the CPU.

    Raises UserError for a reward that returns anything else.
    """
    if not rewards:
        return {}
    scorer = Combined({name: (reward, 1.0) for name, reward in rewards.items()})
    batches = [scorer(images[rows].to(device), prompts[rows]).parts for rows in chunks(len(images), size)]
    return {name: torch.cat([batch[name].float().cpu() for batch in batches]) for name in rewards}
