"""Which run a command means, and whether it may be continued with these settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftplus.config import (
    AnyConfig,
    Config,
    RewardTrainConfig,
    changeable_keys,
    file_keys,
    flatten,
    given_by,
    is_below,
    load_config,
    load_reward_config,
    refuse_bad_name,
    run_name,
    shaping_keys,
    to_dict,
    written,
)
from draftplus.diffusion.methods import check_method
from draftplus.errors import UserError
from draftplus.models.families import resolve
from draftplus.rewards.names import compares_images
from draftplus.runs.directory import REWARDS, is_run, saved_steps
from draftplus.runs.origin import absolute_paths, differences, former_solver, read_origin, reward_run_config, run_config


def plan_run(target: Config | str | Path | None, overrides: Sequence[str]) -> tuple[Config, Path]:
    """The configuration and directory of a run. target: a configuration, a recipe, or a run directory to continue, or
    with another `name` or `output_dir` to start a run like it.

    Raises UserError where the configuration is wrong, or a run would be continued with a changed key.
    """
    if isinstance(target, Config):
        config = settled(load_config(None, overrides, base=target))
        config.name = run_name(config, "run", compares_images(config.reward))
        run = Path(config.output_dir) / config.name
    elif target is not None and is_run(target):
        run = Path(target) if Path(target).name else Path(target).resolve()  # "." has no name
        config, given = settled(run_config(run, overrides)), given_by(overrides)
        if given.get("name") is not None:
            refuse_bad_name("name", given["name"])
        run = Path(given.get("output_dir") or run.parent) / (given.get("name") or run.name)  # else a new one like it
        config.output_dir, config.name = str(run.parent), run.name
    else:
        config = settled(load_config(target or "emoji", overrides))
        config.name = run_name(config, Path(target or "emoji").stem, compares_images(config.reward))
        run = Path(config.output_dir) / config.name
    if is_run(run) and saved_steps(run / "checkpoints"):  # without one there is nothing to continue
        _refuse_changes(config, run)
    elif (run / "adapter").is_dir():  # a run that was killed before its first checkpoint has none, and starts anew
        raise _without_checkpoint(run)
    return config, run


def settled(config: Config) -> Config:
    """The configuration with everything decided that its model decides, and checked against its method.

    Raises UserError where the model is missing or settings do not fit.
    """
    config = resolve(config)
    assert config.sampler.steps is not None
    check_method(config, config.sampler.steps)
    return config


def plan_reward_run(
    target: RewardTrainConfig | str | Path | None, overrides: Sequence[str]
) -> tuple[RewardTrainConfig, Path]:
    """As `plan_run`, of a run that trains a reward. target: a configuration, pairs, a recipe, or a run directory.

    Raises UserError as it does.
    """
    if target is not None and not isinstance(target, RewardTrainConfig) and is_run(target):
        run = Path(target) if Path(target).name else Path(target).resolve()
        config, given = reward_run_config(run, overrides), given_by(overrides, RewardTrainConfig)
        if given.get("name") is not None:
            refuse_bad_name("name", given["name"])
        run = Path(given.get("output_dir") or run.parent) / (given.get("name") or run.name)
        config.output_dir, config.name = str(run.parent), run.name
    else:
        if target is None or isinstance(target, RewardTrainConfig):
            config, stem = load_reward_config(None, overrides, target), "reward"
        elif Path(target).suffix.lower() in (".yaml", ".yml"):
            config, stem = load_reward_config(target, overrides), Path(target).stem
        else:
            config, stem = load_reward_config(None, [f"data.pairs={json.dumps(str(target))}", *overrides]), "reward"
        config.name = run_name(config, stem)
        run = Path(config.output_dir) / config.name
    if is_run(run) and saved_steps(run / "checkpoints"):
        origin = read_origin(run)
        then = dict(origin.config) if origin else flatten(to_dict(absolute_paths(reward_run_config(run))))
        _refuse_differences(config, run, then, origin is not None, shaping_keys(config))
    elif (run / REWARDS.result).is_dir():
        raise _without_checkpoint(run)
    return config, run


def _without_checkpoint(run: Path) -> UserError:
    return UserError(
        f"{run} holds a result but no checkpoint to continue from; choose another name=, or remove the directory"
    )


def _refuse_changes(config: Config, run: Path) -> None:
    origin = read_origin(run)
    then = dict(origin.config) if origin else flatten(to_dict(absolute_paths(resolve(run_config(run, code=())))))
    if "sampler.sigmas" not in then:
        then["sampler.solver"] = former_solver(then["sampler.solver"], config.model)
    _refuse_differences(config, run, then, origin is not None, shaping_keys(config, compares_images(config.reward)))


def _refuse_differences(
    config: AnyConfig, run: Path, then: Mapping[str, Any], hashed: bool, shaping: Collection[str]
) -> None:
    """hashed: whether the content of files is known, which then decides, once the run starts."""
    now, files = flatten(to_dict(absolute_paths(config))), file_keys(config)
    for key, (old, new) in differences(then, now).items():
        if hashed and key in files:
            continue
        # `shaping` lacks new keys that are as they always were
        if key in shaping or not is_below(key, changeable_keys(type(config))):
            before, mend = f"with {key}={written(old)}", f"set {key}={written(old)}"
            if key not in then:
                before, mend = f"without {key}", "leave it out"
            raise UserError(
                f"{run} was started {before}, but now it is {written(new)}; this key cannot change when a run is "
                f"continued. Choose another name= for a new run, or {mend}"
            )
