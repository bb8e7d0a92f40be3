"""A run without weights: its model, its rewards and its networks, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from draftplus.build import build_model, build_problem
from draftplus.config import Config
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.problem import Problem
from draftplus.models.bare import Encoder
from draftplus.planning.meter import META, counting
from draftplus.planning.rewards import Uncounted, bare_reward
from draftplus.rewards.names import refuse_unknown_reward
from draftplus.rewards.offloaded import networks_of
from draftplus.types import Model, Reward


@dataclass(frozen=True)
class Subject:
    """A run without weights. rewards: by name, those that are trained on and those that are held out."""

    config: Config
    model: Model
    rewards: Mapping[str, Reward]
    problem: Problem

    @property
    def uncounted(self) -> list[str]:
        return [name for name, reward in self.rewards.items() if isinstance(reward, Uncounted)]


def subject(config: Config) -> Subject:
    """The run of a configuration, without weights.

    Raises UserError for what does not fit together, as training does.
    """
    differentiates = METHODS[config.objective.method].differentiates
    named = {**config.eval.rewards, **config.reward}
    for name in named:
        refuse_unknown_reward(name)
    # where networks lie is reckoned here, not moved
    model = build_model(replace(config.model, offload=False), META, config.seed)
    with counting():
        model.encode([None])  # which makes the encoders
    rewards = {name: bare_reward(name, one, differentiates) for name, one in named.items()}
    return Subject(config, model, rewards, build_problem(config, model, rewards))


def networks_by_part(run: Subject) -> dict[str, list[nn.Module]]:
    """By the part of the memory that they are."""
    model: Any = run.model
    tuned = model.tuned
    parts = {
        "denoiser": [tuned.denoiser],
        "frozen copy": [tuned.frozen] if tuned.frozen is not None else [],
        "autoencoder": [model.vae],
        "text encoders": [one for one in tuned.encoders.values() if isinstance(one, Encoder)],
        "rewards": list(dict.fromkeys(one for reward in run.rewards.values() for one in _within(reward))),
    }
    return parts


def _within(reward: Reward) -> list[nn.Module]:
    features: Any = getattr(reward, "features", None)  # a method of a reward that the reward holds
    return networks_of(reward) + (networks_of(features.__self__) if hasattr(features, "__self__") else [])


def tensors_of(networks: Mapping[str, list[nn.Module]]) -> Iterator[Tensor]:
    for found in networks.values():
        for network in found:
            yield from network.parameters()
            yield from network.buffers()


def parameters(run: Subject) -> dict[str, int]:
    """How many parameters the networks have, by part, and how many are trained."""
    counts = {
        part: sum(one.numel() for network in found for one in network.parameters())
        for part, found in networks_by_part(run).items()
    }
    trained = sum(one.numel() for one in run.model.tuned.trainable().values())
    if not counts.pop("frozen copy"):
        counts["denoiser"] -= trained
    return {"trained": trained, **counts}
