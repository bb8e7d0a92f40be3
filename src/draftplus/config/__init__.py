"""The configuration: typed dataclasses, a YAML recipe over them, `key=value` over that.

Importing it does not import torch, so that the command line starts at once.
"""

from draftplus.config.check import refuse_bad_name, refuse_nobodys_home
from draftplus.config.facts import facts_of
from draftplus.config.keys import (
    ADDED,
    BASE_MODEL,
    CHANGEABLE,
    all_keys,
    base_model_of,
    changeable_keys,
    choices_of,
    describe_keys,
    file_keys,
    flatten,
    is_below,
    keys_that_affect,
    keys_where,
    nearest,
    to_dict,
    to_yaml,
    values,
)
from draftplus.config.load import (
    given_by,
    load_config,
    load_reward_config,
    load_reward_run_config,
    load_run_config,
    recipe_names,
    recipe_path,
    run_name,
    shaping_keys,
    trains_reward,
    with_new_names,
)
from draftplus.config.objective import ObjectiveConfig
from draftplus.config.reading import read_yaml, written
from draftplus.config.rewards import COMMANDS, AnyConfig, RewardTrainConfig
from draftplus.config.schema import (
    KNOBS,
    Config,
    LoraConfig,
    ModelConfig,
    RewardConfig,
    SamplerConfig,
    StopConfig,
)  # fmt: skip
from draftplus.config.trust import refuse_library, refuse_untrusted, remember, trusting
from draftplus.config.typed import is_text

__all__ = [
    "ADDED", "BASE_MODEL", "CHANGEABLE", "COMMANDS", "KNOBS", "AnyConfig", "Config", "LoraConfig", "ModelConfig",
    "ObjectiveConfig", "RewardConfig", "RewardTrainConfig", "SamplerConfig", "StopConfig", "all_keys",
    "base_model_of", "changeable_keys", "choices_of", "describe_keys", "facts_of", "file_keys", "flatten", "given_by",
    "is_below", "is_text", "keys_that_affect", "keys_where", "load_config", "load_reward_config",
    "load_reward_run_config", "load_run_config", "nearest", "read_yaml", "recipe_names", "recipe_path",
    "refuse_bad_name", "refuse_library",
    "refuse_nobodys_home", "refuse_untrusted", "remember", "run_name", "shaping_keys", "to_dict", "to_yaml",
    "trains_reward", "trusting", "values", "with_new_names", "written",
]  # fmt: skip
