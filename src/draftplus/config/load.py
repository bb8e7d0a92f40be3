"""Reading a configuration: a YAML recipe over the defaults, `key=value` over that."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from draftplus.config.check import check
from draftplus.config.keys import CHANGEABLE, all_keys, dataclass_of, flatten, nearest, to_dict
from draftplus.config.schema import Config, RewardConfig
from draftplus.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"

RENAMED = {"model.unet": "model.denoiser"}  # a key in runs of earlier versions -> its name now, in the same section


def load_config(recipe: str | Path | None = None, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """The configuration of a recipe with `key=value` overrides, checked.

    recipe: a built-in name (see `recipe_names`), a YAML file, or None. base: the configuration to change, instead of
    the defaults.

    Raises UserError for an unknown recipe or key (naming the nearest), a wrong type, or values that do not fit
    together.
    """
    return _merged(_recipe_layers(recipe) if recipe is not None else [], overrides, base)


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run was made with, with `key=value` overrides, checked.

    run: a run directory. It may use key names of earlier versions; overrides may not.

    Raises UserError as `load_config` does.
    """
    *parents, own = _recipe_layers(run / "config.yaml")
    return _merged([*parents, with_new_names(own)], overrides)


def with_new_names(tree: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """A run's nested configuration with today's key names; a key that is there under both names keeps both."""
    told: dict[Any, Any] = {}
    for key, value in tree.items():
        new = RENAMED.get(f"{prefix}{key}", "").rpartition(".")[2]
        inner = with_new_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        told[key if not new or new in tree else new] = inner
    return told


_hints = cache(get_type_hints)


@cache
def _defaults() -> Any:
    return OmegaConf.structured(Config)  # takes far longer than a copy, and a sweep reads a thousand configurations


def _merged(recipe: Sequence[dict[str, Any]], overrides: Sequence[str], base: Config | None = None) -> Config:
    layers = [*recipe, *map(_parse_override, overrides)]
    merged = copy.deepcopy(_defaults()) if base is None else OmegaConf.structured(base)
    for layer in layers:
        _check_keys(layer, Config)
        if isinstance(layer.get("reward"), Mapping) and layer.pop("__replace_reward__", False):
            merged.reward = {}
        try:
            merged = OmegaConf.unsafe_merge(merged, layer)  # a copy at each layer would take most of the time
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(_said(error, ", ".join(flatten(layer)))) from None
    try:
        config = OmegaConf.to_object(merged)  # resolves references, such as ${oc.env:HOME}
    except OmegaConfBaseException as error:
        raise UserError(_said(error, "configuration")) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _said(error: Exception, where: str) -> str:
    key, message = getattr(error, "full_key", None) or where, getattr(error, "msg", None) or str(error)
    return f"{key}: {message.splitlines()[0]}"


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The YAML file of a built-in recipe's name or of a path.

    Raises UserError where there is neither, naming the nearest built-in recipe.
    """
    built_in = RECIPES / f"{recipe}.yaml"
    if built_in.is_file():
        return built_in
    path = Path(recipe)
    if path.is_file():
        return path
    near = nearest(str(recipe), recipe_names())
    raise UserError(
        f"recipe '{recipe}': no such file or built-in recipe; {near or 'built in: ' + ', '.join(recipe_names())}"
    )


def _recipe_layers(recipe: str | Path, children: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    path = recipe_path(recipe)
    if path.resolve() in children:
        raise UserError(f"{path} extends itself through {children[-1]}; remove extends from one of the recipes")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's errors share no base class with OmegaConf's
        raise UserError(f"{path}: not a YAML file: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected keys and values, found {type(loaded).__name__}")
    parent, own = loaded.pop("extends", None), _normalise_reward(loaded, replace=True)
    if parent is None:
        return [own]
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends is {parent!r}; give the name or file of one recipe")
    beside = path.parent / parent
    return [*_recipe_layers(beside if beside.is_file() else parent, (*children, path.resolve())), own]


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': expected KEY=VALUE, such as optim.lr=1e-4")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
    except Exception as error:
        raise UserError(f"{text}: cannot read the value: {str(error).splitlines()[0]}") from None
    assert isinstance(parsed, dict)
    return _normalise_reward(parsed, replace=key == "reward")


def _normalise_reward(layer: dict[Any, Any], replace: bool) -> dict[str, Any]:
    """Makes a mapping of a reward's bare name. replace: whether the rewards of earlier layers are dropped."""
    if "reward" not in layer:
        return layer
    reward = layer["reward"]
    if isinstance(reward, str):
        reward = {reward: {}}
    if not isinstance(reward, dict) or not reward:
        raise UserError(
            f"reward: expected a name or a mapping of names, got {reward!r}; for example, reward=emoji_clip"
        )
    return {**layer, "reward": {name: value or {} for name, value in reward.items()}, "__replace_reward__": replace}


def _check_keys(layer: Mapping[str, Any], node: Any, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(node)}
    for key, value in layer.items():
        if key == "__replace_reward__":
            continue
        if key not in known:
            if f"{prefix}{key}" in RENAMED:
                raise UserError(f"unknown key '{prefix}{key}'; it is now called '{RENAMED[f'{prefix}{key}']}'")
            near = nearest(f"{prefix}{key}", [*(k for k, _ in all_keys()), *(f"{prefix}{name}" for name in known)])
            raise UserError(f"unknown key '{prefix}{key}'; {near or 'draftplus train --help lists all keys'}")
        child = dataclass_of(known[key])
        if _hints(node)[key] == dict[str, RewardConfig] and isinstance(value, Mapping):
            for name, settings in value.items():
                if isinstance(settings, Mapping):
                    _check_keys(settings, RewardConfig, f"{prefix}{key}.{name}.")
        elif child is not None and isinstance(value, Mapping):
            _check_keys(value, child, f"{prefix}{key}.")


def shaping_keys(config: Config, compares_images: bool) -> dict[str, Any]:
    """The dotted keys and values that shape the trajectory, and so must not change when a run is continued.

    compares_images: whether a reward's scores depend on the micro-batch (`build.compares_images`), whose size then
    shapes it too.
    """
    shaping = {"train.micro_batch_size"} if compares_images else set()
    changeable = tuple(f"{key}." for key in CHANGEABLE if key not in shaping)
    return {key: value for key, value in flatten(to_dict(config)).items() if not f"{key}.".startswith(changeable)}


def run_name(config: Config, recipe: str, compares_images: bool) -> str:
    """`name`, or the recipe's name with 8 hexadecimal digits of the hash of the keys that shape the trajectory.

    compares_images: as for `shaping_keys`.
    """
    if config.name:
        return config.name
    # by the former names, so that the same command still finds a run of an earlier version
    former = {new: old for old, new in RENAMED.items()}
    shaping = shaping_keys(config, compares_images).items()
    text = json.dumps({former.get(key, key): value for key, value in shaping}, sort_keys=True)
    return f"{recipe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
