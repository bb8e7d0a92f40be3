"""The names of rewards, of which little is known before torch is there.

`build` makes objects of them, as of those of models and metrics.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from draftplus.config import nearest
from draftplus.errors import UserError

REWARDS = {
    "emoji_clip": "draftplus.rewards.clip:load_emoji_clip",
    "pickscore": "draftplus.rewards.clip:load_pickscore",
    "clip_score": "draftplus.rewards.clip:load_clip_score",
    "clip_h": "draftplus.rewards.clip:load_clip_h",
    "clip": "draftplus.rewards.clip:load_clip",
    "hpsv2": "draftplus.rewards.hpsv2:load_hpsv2",
    "aesthetic": "draftplus.rewards.aesthetic:load_aesthetic",
    "image_reward": "draftplus.rewards.image_reward:load_image_reward",
    "mps": "draftplus.rewards.mps:load_mps",
    "hpsv3": "draftplus.rewards.hpsv3:load_hpsv3",
    "jpeg_compressibility": "draftplus.rewards.jpeg:load_jpeg_compressibility",
    "jpeg_incompressibility": "draftplus.rewards.jpeg:load_jpeg_incompressibility",
    "dissimilarity": "draftplus.rewards.dissimilarity:load_dissimilarity",
}

# those of them whose scores depend on the other images of a micro-batch, as their attribute `compares_images` says
COMPARING = {"draftplus.rewards.dissimilarity:load_dissimilarity"}


def resolved(target: str) -> Any:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def refuse_unknown_reward(name: str) -> None:
    """UserError for a name that is neither a built-in reward nor could be a user's own; it names the nearest."""
    if not is_reward(name):
        near = nearest(name, list(REWARDS))
        raise UserError(
            f"unknown reward '{name}'; {near or 'built in: ' + ', '.join(REWARDS) + '.'} "
            "For your own reward, give package.module:object"
        )


def reward_loader(name: str) -> Any:
    """The callable behind a reward's name.

    Raises UserError where a user's own does not exist.
    """
    if name in REWARDS:
        return resolved(REWARDS[name])
    from draftplus.rewards.custom import resolve_custom

    return resolve_custom(name)


def is_reward(name: str) -> bool:
    """Whether a name is a reward's: a built-in one, or a user's own."""
    return ":" in name or name in REWARDS


def compares_images(rewards: Iterable[str]) -> bool:
    """Whether any of the rewards of these names scores an image by the others of its micro-batch.

    No weights are loaded: the callable that makes a user's own has the attribute `compares_images`. False for a name
    that is no reward or cannot be imported; building it reports that.
    """
    return any(_compares_images(name) for name in rewards)


def _compares_images(name: str) -> bool:
    if REWARDS.get(name, "").startswith("draftplus."):
        return REWARDS[name] in COMPARING  # to import it would be to import torch
    return bool(getattr(_maker(name), "compares_images", False))


def _maker(name: str) -> Any:
    try:
        return reward_loader(name)
    except Exception:  # a user's module may raise anything
        return None
