"""A run of the small model in float64 whose reward has a network, on one process and in parts on several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftplus.build import build_reward
from draftplus.config import Config, RewardConfig
from draftplus.config.schema import SamplerConfig, TrainConfig
from draftplus.distributed import World, world
from draftplus.distributed.sharding import layers, own
from draftplus.evaluation.held_out import measure
from draftplus.evaluation.held_out_set import EvaluationSet
from draftplus.rewards.combined import Combined
from draftplus.training.placement import Placement, Replicated, Sharded
from tests.support.steps import BATCH, OBJECTIVES, take_steps
from tests.tiny import CPU, randomize, tiny_model

PROMPTS = ["a cat", "a dog on a blue background", "a bee"]  # which neither two nor four processes share evenly


def work(path: str, full: bool, methods: Sequence[str], here: World, placement: Placement) -> dict[str, Any]:
    """What some methods did, what an evaluation found, and the numbers that this process holds of what is frozen.

    The decoder computes its blocks again in the backward pass.
    """
    model = tiny_model(Path(path), full=full, gradient_checkpointing=True)
    randomize(model)
    placement.place(model)
    reward: Any = build_reward("emoji_clip", RewardConfig(), CPU, torch.float64)
    placement.place_reward(reward)
    score, micro = Combined({"emoji_clip": (reward, 1.0)}), max(1, BATCH // here.size // 2)
    made = {
        name: vars(take_steps(model, OBJECTIVES[name], micro, None, here=here, placement=placement, score=score))
        for name in methods
    }
    config = Config(sampler=SamplerConfig(steps=3, guidance_scale=3.0), train=TrainConfig(micro_batch_size=3))
    found = measure(
        model, {"emoji_clip": reward}, lambda means: means["emoji_clip"], EvaluationSet(PROMPTS, 2), config,
        Path("pictures"), here, lambda *_: None,
    )  # fmt: skip
    held = {name: _numbers(network) for name, network in (("decoder", model.decoder), ("reward", reward.divisible[0]))}
    return {"made": made, "evaluated": vars(found), "held": held}


def _numbers(network: nn.Module) -> int:
    return sum(own(one).numel() for layer in layers(network) for one in layer.parameters())


def work_alone(path: str, full: bool, methods: Sequence[str]) -> dict[str, Any]:
    here = World(0, 1, CPU)
    return work(path, full, methods, here, Replicated(here))


def work_in_parts(path: str, full: bool, methods: Sequence[str], within: int | None) -> None:
    """On this rank; what came out is saved in the working directory."""
    with world("cpu") as here:
        torch.save(work(path, full, methods, here, Sharded(here, within, 0)), "worked.pt")
