"""The configuration: typed dataclasses, a YAML recipe over them, `key=value` over that.

Importing it does not import torch, so that the command line starts at once.
"""

from draftplus.config.keys import all_keys, describe_keys, flatten, nearest, to_dict, to_yaml
from draftplus.config.load import BASE_MODEL, load_config, recipe_names, recipe_path, run_name, shaping_keys
from draftplus.config.schema import (
    Config,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    RewardConfig,
    SamplerConfig,
    StopConfig,
)  # fmt: skip

__all__ = [
    "BASE_MODEL", "Config", "LoraConfig", "ModelConfig", "ObjectiveConfig", "RewardConfig", "SamplerConfig",
    "StopConfig", "all_keys", "describe_keys", "flatten", "load_config", "nearest", "recipe_names", "recipe_path",
    "run_name", "shaping_keys", "to_dict", "to_yaml",
]  # fmt: skip
