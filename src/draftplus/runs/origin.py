"""What a run was started with: its configuration, and the content of the files that shape it.

It continues with the same, and says so where it finds something else.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from draftplus.config import (
    AnyConfig,
    Config,
    ModelConfig,
    RewardTrainConfig,
    flatten,
    is_below,
    load_reward_run_config,
    load_run_config,
    read_yaml,
    to_dict,
    values,
)
from draftplus.data.prompts import BUILT_IN
from draftplus.errors import UserError
from draftplus.launcher import is_main_process
from draftplus.models.families import MODELS
from draftplus.models.paths import PACKAGED
from draftplus.runs.checksums import seal, unseal
from draftplus.runs.files import write_text

C = TypeVar("C", bound=AnyConfig)

ORIGIN = "origin.json"
REWARD_MODELS = ("emoji_clip",)  # names that are no paths: what a reward may be trained from
OPEN = ("reward", "eval.rewards", "model.lora")  # what lies below may be absent


@dataclass(frozen=True)
class Origin:
    """step: since which `inputs` are known. inputs: hashes by key. config: every key, as it was written last.
    last_sigma: the noise level of the last sampling step; None in runs of earlier versions.
    """

    step: int
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    last_sigma: float | None = None


def read_origin(run: Path) -> Origin | None:
    """None for a run of an earlier version. Raises UserError where it is damaged."""
    try:
        told = unseal((run / ORIGIN).read_text(encoding="utf-8"))
        return Origin(told["step"], told["inputs"], told["config"], told.get("last_sigma"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise UserError(f"{run / ORIGIN}: damaged ({error}); remove it to go on without what it recorded") from None


def write_origin(
    run: Path, config: AnyConfig, inputs: Mapping[str, str], step: int, last_sigma: float | None = None
) -> None:
    """Notes the configuration, the level of the last sampling step, and the inputs that are not noted yet."""
    before = read_origin(run)
    since, known = (before.step, before.inputs) if before else (step, {})
    told = {"step": since, "inputs": {**inputs, **known}, "config": flatten(to_dict(absolute_paths(config)))}
    write_text(run / ORIGIN, seal({**told, "last_sigma": last_sigma}))


def run_config(run: Path, overrides: Sequence[str] = (), code: Collection[str] | None = None) -> Config:
    """A run's configuration; where config.yaml was edited, that is told on stderr. code: as for `load_run_config`.

    Raises UserError as `load_run_config` does.
    """
    _tell_of_edits(run, edited(run))
    config = load_run_config(run, overrides, code)
    if "sigmas" not in read_yaml(run / "config.yaml").get("sampler", {}):
        config.sampler.solver = former_solver(config.sampler.solver, config.model)
    return config


def reward_run_config(run: Path, overrides: Sequence[str] = ()) -> RewardTrainConfig:
    """`run_config` of a run that trains a reward."""
    now = flatten(to_dict(load_reward_run_config(run)))
    before = read_origin(run)
    _tell_of_edits(run, {} if before is None else differences(before.config, now))
    return load_reward_run_config(run, overrides)


def _tell_of_edits(run: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (then, now) in changed.items():
        _tell(f"{run / 'config.yaml'} was edited or damaged since draftplus wrote it: {key} was {then}, is {now}")


def former_solver(solver: str, model: ModelConfig) -> str:
    """What `sampler.solver` means in a run of a version before `sampler.sigmas`, where auto was DDIM for all models but
    those of flow matching."""
    from draftplus.diffusion.schedule import is_flow, solver_of
    from draftplus.models.scheduler_file import scheduler_config

    file = scheduler_config(model) if solver == "auto" else {}
    return "ddim" if solver == "auto" and not is_flow(file) and solver_of(file) != "ddim" else solver


def edited(run: Path) -> dict[str, tuple[Any, Any]]:
    """The keys of config.yaml that are not as they were written: what they were, and are."""
    before = read_origin(run)
    return {} if before is None else differences(before.config, flatten(to_dict(load_run_config(run, code=()))))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, new ones last. What only one of two versions of draftplus has is left out."""
    changed = {key for key in then.keys() & now.keys() if then[key] != now[key]}
    gone = {key for key in then.keys() - now.keys() if is_below(key, OPEN) and then[key] != {}}
    new = {key for key in now.keys() - then.keys() if is_below(key, OPEN[:2]) and now[key] != {}}
    # every reward has a weight, args are its own, and what earlier versions lack is null
    told = {key for key in new if key.endswith(".normalise") and now[key] is not None}
    new = told | {key for key in new if key.endswith(".weight") or ".args." in key}
    return {key: (then.get(key), _at(now, key)) for key in [*sorted(changed | gone), *sorted(new)]}


def _at(flat: Mapping[str, Any], key: str) -> Any:
    """A key's value; of a section, what lies below it."""
    below = {name.removeprefix(f"{key}."): value for name, value in flat.items() if name.startswith(f"{key}.")}
    return flat.get(key, below or None)


@cache
def _tell(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


def absolute_paths(config: C) -> C:
    """The configuration with whole paths to the files that it names, so that it means the same in any directory."""
    told = copy.deepcopy(config)
    for key, facts, value in list(values(told)):
        if facts.file:
            section, _, last = key.rpartition(".")
            setattr(_inside(told, section), last, _absolute(value))
    return told


def _inside(node: Any, key: str) -> Any:
    """What a key names; the name of a reward, module:object, may have dots of its own."""
    if not key:
        return node
    if isinstance(node, dict):
        name = next(name for name in node if key == name or key.startswith(f"{name}."))
        return _inside(node[name], key[len(name) + 1 :])
    name, _, rest = key.partition(".")
    return _inside(getattr(node, name), rest)


def _absolute(path: str | None) -> str | None:
    if path is None or path in (*MODELS, *BUILT_IN, *PACKAGED, *REWARD_MODELS):
        return path
    local = Path(path).expanduser()
    if local.exists() or set(path) & set("*?[{"):
        # a link stays itself, since its name may say what it is: in the hub's cache its target has no suffix
        return str(local.parent.resolve() / local.name)
    return path
