"""draftplus: reward fine-tuning of text-to-image diffusion models that keeps their variety."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "Config": "draftplus.config",
    "RewardTrainConfig": "draftplus.config",
    "PackRules": "draftplus.data.pack",
    "UserError": "draftplus.errors",
    "convert_reward": "draftplus.api",
    "describe": "draftplus.api",
    "evaluate": "draftplus.api",
    "export": "draftplus.api",
    "generate": "draftplus.api",
    "describe_reward": "draftplus.api",
    "load_config": "draftplus.config",
    "load_model": "draftplus.api",
    "load_reward": "draftplus.api",
    "pack_prompts": "draftplus.api",
    "pairwise_lpips": "draftplus.metrics.lpips",
    "score": "draftplus.api",
    "score_pairs": "draftplus.api",
    "show_prompts": "draftplus.api",
    "sweep": "draftplus.api",
    "train": "draftplus.api",
    "train_reward": "draftplus.api",
    "write_images": "draftplus.api",
    "write_report": "draftplus.report",
}
__all__ = sorted(_FUNCTIONS)


def __getattr__(name: str) -> Any:  # the functions need torch; `import draftplus` alone does not
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'draftplus' has no attribute '{name}'")
    return getattr(import_module(_FUNCTIONS[name]), name)
