"""Reading a configuration: a YAML recipe over the defaults, `key=value` over that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from draftplus.config.check import check, check_values, refuse_bad_name
from draftplus.config.keys import changeable_keys, flatten, is_below, nearest, to_dict, values
from draftplus.config.reading import read_text, read_value, read_yaml
from draftplus.config.rewards import COMMANDS, REWARD, AnyConfig, RewardTrainConfig
from draftplus.config.schema import Config
from draftplus.config.trust import refuse_untrusted
from draftplus.config.typed import RENAMED, assigned, is_text, joined
from draftplus.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"

C = TypeVar("C", bound=AnyConfig)

LAST_SECTION = "log"  # of the schema, in the files of every version: what is cut off has lost it


def load_config(recipe: str | Path | None = None, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """The configuration of a recipe with `key=value` overrides, checked.

    recipe: a built-in name (see `recipe_names`), a YAML file, or None. base: the configuration to change, instead of
    the defaults.

    Raises UserError for an unknown recipe or key (naming the nearest), a wrong type, values that do not fit together,
    or code that a file names and that is not trusted.
    """
    layers = _recipe_layers(recipe) if recipe is not None else []
    config = _merged(layers, overrides, Config, base)
    check(config)
    if config.name is not None:  # a run that is there already keeps its own
        refuse_bad_name("name", config.name)
    _refuse_untrusted(config, layers, overrides)
    return config


def load_run_config(run: Path, overrides: Sequence[str] = (), code: Collection[str] | None = None) -> Config:
    """The configuration that a run was made with, with `key=value` overrides, checked.

    run: a run directory. It may use key names of earlier versions; overrides may not. code: the rewards that are going
    to be imported, by name; None: all of them.

    Raises UserError as `load_config` does, and for a file whose end is missing.
    """
    layers = _run_layers(run)
    config = _merged(layers, overrides, Config)
    check(config)
    _refuse_untrusted(config, layers, overrides, code)
    return config


def load_reward_config(
    recipe: str | Path | None = None, overrides: Sequence[str] = (), base: RewardTrainConfig | None = None
) -> RewardTrainConfig:
    """The configuration of a training of a reward, as `load_config` reads one of fine-tuning. There is no built-in
    recipe.

    Raises UserError as `load_config` does.
    """
    layers = _recipe_layers(recipe) if recipe is not None else []
    config = _merged(layers, overrides, RewardTrainConfig, base)
    check_values(config)
    if config.name is not None:
        refuse_bad_name("name", config.name)
    return config


def load_reward_run_config(run: Path, overrides: Sequence[str] = ()) -> RewardTrainConfig:
    """The configuration of a run that trains a reward, as `load_run_config` reads one of fine-tuning.

    Raises UserError as it does, and for a run of fine-tuning.
    """
    layers = _run_layers(run)
    if not any("task" in layer.tree for layer in layers):
        raise UserError(
            f"{run} is a run of fine-tuning, which does not train a reward; continue it with: {COMMANDS[Config]} {run}"
        )
    config = _merged(layers, overrides, RewardTrainConfig)
    check_values(config)
    return config


def trains_reward(run: Path) -> bool:
    """Whether a run directory is one of `draftplus reward train`; one whose config.yaml cannot be read is not."""
    try:
        return (run / "config.yaml").is_file() and read_yaml(run / "config.yaml").get("task") == REWARD
    except UserError:
        return False


def _run_layers(run: Path) -> list[_Layer]:
    *parents, own = _recipe_layers(run / "config.yaml")
    if not any(LAST_SECTION in layer.tree for layer in [*parents, own]):
        raise UserError(
            f"{run / 'config.yaml'} is empty or cut off, so the settings of this run are not known; put back a copy of "
            "it, or repeat the command that started the run"
        )
    return [*parents, own._replace(tree=with_new_names(own.tree))]


def given_by(overrides: Sequence[str], schema: Any = Config) -> dict[str, Any]:
    """What `key=value` arguments say, as one nested configuration. schema: whose keys they are."""
    told: dict[str, Any] = {}
    for text in overrides:
        told = joined(told, _parse_override(text, schema).tree, text)
    return told


def with_new_names(tree: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """A run's nested configuration with today's key names; a key that is there under both names keeps both."""
    told: dict[Any, Any] = {}
    for key, value in tree.items():
        new = RENAMED.get(f"{prefix}{key}", "").rpartition(".")[2]
        inner = with_new_names(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        told[key if not new or new in tree else new] = inner
    return told


class _Layer(NamedTuple):
    """Settings over those before. file: that they are from. replaces: whether its rewards are instead of the others."""

    tree: Mapping[Any, Any]
    file: Path | None = None
    replaces: bool = True


def _refuse_untrusted(
    config: Config, layers: Sequence[_Layer], overrides: Sequence[str], code: Collection[str] | None = None
) -> None:
    files = [(layer.file, layer.tree) for layer in layers if layer.file]
    refuse_untrusted(config, files, given_by(overrides), code, lambda: _merged(layers, (), Config))


def _merged(recipe: Sequence[_Layer], overrides: Sequence[str], schema: type[C], base: C | None = None) -> C:
    given = [] if base is None else [_Layer(to_dict(base))]
    config: Any = schema()
    for tree, file, replaces in [*given, *recipe, *(_parse_override(text, schema) for text in overrides)]:
        _refuse_other_task(tree, file, schema)
        if replaces and schema is Config and isinstance(tree.get("reward"), Mapping):
            config = replace(config, reward={})
        config = assigned(schema, tree, config, "", f"{file}: " if file else "", schema)
    told: C = config
    return told


def _refuse_other_task(tree: Mapping[Any, Any], file: Path | None, schema: Any) -> None:
    if schema is Config and file is not None and tree.get("task") == REWARD:
        run = file.parent if file.name == "config.yaml" else file
        raise UserError(
            f"{run} trains a reward, which is no model to fine-tune or to draw with; continue it with: "
            f"{COMMANDS[RewardTrainConfig]} {run}. Its result is a reward: reward=clip reward.clip.path={run}/reward"
        )


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str | Path) -> Path:
    """The YAML file of a built-in recipe's name or of a path.

    Raises UserError where there is neither, naming the nearest built-in recipe.
    """
    if str(recipe) in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_file():
        return path
    near = nearest(str(recipe), recipe_names())
    raise UserError(
        f"recipe '{recipe}': no such file or built-in recipe; {near or 'built in: ' + ', '.join(recipe_names())}"
    )


def _recipe_layers(recipe: str | Path, children: tuple[Path, ...] = ()) -> list[_Layer]:
    path = recipe_path(recipe)
    if path.resolve() in children:
        raise UserError(f"{path} extends itself through {children[-1]}; remove extends from one of the recipes")
    if path.suffix.lower() not in (".yaml", ".yml"):  # a recipe of somebody else may not look into any file
        raise UserError(f"{path}: the name of a recipe ends in .yaml; rename it if it is one")
    loaded = read_yaml(path)
    parent, own = loaded.pop("extends", None), _Layer(_normalise_reward(loaded, f"{path}: "), path)
    if parent is None:
        return [own]
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends is {parent!r}; give the name or file of one recipe")
    beside = path.parent / parent
    return [*_recipe_layers(beside if beside.is_file() else parent, (*children, path.resolve())), own]


def _parse_override(text: str, schema: Any = Config) -> _Layer:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': expected KEY=VALUE, such as optim.lr=1e-4")
    tree: Any = read_text(value) if is_text(key, schema) else read_value(value, key)
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return _Layer(_normalise_reward(tree), replaces=key == "reward")


def _normalise_reward(layer: Mapping[Any, Any], where: str = "") -> Mapping[Any, Any]:
    """Makes a mapping of a reward's bare name."""
    if "reward" not in layer:
        return layer
    reward = layer["reward"]
    if isinstance(reward, str):
        reward = {reward: {}}
    if not isinstance(reward, Mapping) or not reward:
        raise UserError(
            f"{where}reward: expected a name or a mapping of names, got {reward!r}; for example, reward=emoji_clip"
        )
    return {**layer, "reward": {name: {} if value is None else value for name, value in reward.items()}}


def shaping_keys(config: AnyConfig, compares_images: bool = False) -> dict[str, Any]:
    """The dotted keys and values that shape the trajectory, and so must not change when a run is continued.

    compares_images: whether a reward's scores depend on the micro-batch (`rewards.names.compares_images`), whose size
    then shapes it too.
    """
    shaping = {"train.micro_batch_size"} if compares_images else set()
    changeable = tuple(f"{key}." for key in changeable_keys(type(config)) if key not in shaping)
    return {key: value for key, value in flatten(to_dict(config)).items() if not f"{key}.".startswith(changeable)}


def run_name(config: AnyConfig, recipe: str, compares_images: bool = False) -> str:
    """`name`, or the recipe's name with 8 hexadecimal digits of the hash of the keys that shape the trajectory.

    compares_images: as for `shaping_keys`.
    """
    if config.name:
        return config.name
    # by the former names, so that the same command still finds a run of an earlier version
    former = {new: old for old, new in RENAMED.items()}
    added, default = {key for key, facts, _ in values(config) if facts.added}, flatten(to_dict(type(config)()))
    shaping = shaping_keys(config, compares_images).items()  # of a reward that is no default, what is added is null
    named = {former.get(k, k): v for k, v in shaping if not (is_below(k, added) and default.get(k) == v)}
    text = json.dumps(named, sort_keys=True)
    return f"{recipe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
