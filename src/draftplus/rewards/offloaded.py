"""Rewards whose networks are off the device while images are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from draftplus.distributed import Offload
from draftplus.types import Reward


@dataclass(frozen=True)
class Offloaded:
    """A reward whose networks come to the device when it is called."""

    reward: Reward
    networks: Sequence[nn.Module]
    offload: Offload

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def compares_images(self) -> bool:
        return getattr(self.reward, "compares_images", False)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,)."""
        self.offload.use(*self.networks)
        return self.reward(images, prompts)


def offloaded(rewards: Mapping[str, Reward], offload: Offload) -> dict[str, Reward]:
    """The rewards, which leave the device with the other networks where these do."""
    if not offload.on:
        return dict(rewards)
    made: dict[str, Reward] = {}
    for name, reward in rewards.items():
        networks = [network for network in networks_of(reward) if _is_on(network, offload.device.type)]
        offload.use(*networks)
        made[name] = Offloaded(reward, networks, offload)
    return made


def networks_of(reward: Any, depth: int = 2) -> list[nn.Module]:
    """The networks that a reward is or that it holds in attributes, its own or those of an object that is one of them.

    What a user's own keeps elsewhere, such as in a global variable or a list, is not found.
    """
    holder = getattr(reward, "__self__", reward)  # of a method
    if isinstance(holder, nn.Module):
        return [holder]
    if depth == 0 or isinstance(holder, (type, ModuleType)):
        return []
    found = [network for one in getattr(holder, "__dict__", {}).values() for network in networks_of(one, depth - 1)]
    return list(dict.fromkeys(found))


def _is_on(network: nn.Module, device: str) -> bool:
    """Whether all of it is, or its user has put it elsewhere, where it stays."""
    return all(tensor.device.type == device for tensor in (*network.parameters(), *network.buffers()))
