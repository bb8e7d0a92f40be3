"""Which runs a sweep has, all of them checked before the first starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from draftplus.config import (
    Config,
    given_by,
    load_config,
    nearest,
    read_yaml,
    recipe_path,
    refuse_bad_name,
    refuse_untrusted,
    to_dict,
)
from draftplus.data.prompts import PromptSet, load_prompts
from draftplus.errors import UserError
from draftplus.evaluation.held_out_set import evaluation_set
from draftplus.launcher import is_main_process
from draftplus.progress import progress
from draftplus.rewards.names import refuse_unknown_reward
from draftplus.runs.directory import saved_steps
from draftplus.runs.plan import plan_run, settled
from draftplus.sweeps import grid
from draftplus.sweeps.manifest import read_manifest
from draftplus.training.sizes import micro_batch_size, total_steps

FILE_KEYS = ("recipe", "name", "grid", "runs")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. settings: KEY=VALUE, as given. steps: how many optimizer steps it takes."""

    name: str
    settings: list[str]
    config: Config
    steps: int


@dataclass(frozen=True)
class Plan:
    """A sweep: its directory, the recipe under every run, the grid as it is written, and the runs."""

    directory: Path
    recipe: str
    grid: dict[str, list[str]]
    runs: list[PlannedRun]

    def arguments(self, run: PlannedRun) -> list[str]:
        """What `draftplus train` is called with."""
        return [self.recipe, *run.settings, f"output_dir={json.dumps(str(self.directory))}", f"name={run.name}"]


def plan_sweep(
    recipe: str | Path, over: Mapping[str, Sequence[str]], name: str | None = None, parent: Path = Path("sweeps")
) -> Plan:
    """The runs of a sweep under `parent`/`name`.

    recipe: a recipe, or a sweep file, whose grid `over` extends and overrides. name: null means the name that the file
    gives or its own; for a recipe, and where there is an `over`, with a hash of the runs.

    Raises UserError for an empty grid, one of more than 1,000 runs, or a run that could not be trained as configured,
    naming its key and value.
    """
    file = read_sweep_file(recipe)
    cells = {**file.grid, **{key: list(values) for key, values in over.items()}}
    settings = grid.expand(grid.with_variants(cells), [grid.with_variants(run) for run in file.runs])
    if name is not None and not name.strip():
        raise UserError("--name is empty; give a plain name, or leave it out")
    chosen = name or (file.name if not over else None) or f"{Path(recipe).stem}-{_hash(file.recipe, settings)}"
    if "/" in chosen or chosen in (".", "..") or "=" in chosen:
        raise UserError(f"name '{chosen}': give a plain name without / or =; the sweep goes to {parent / 'NAME'}")
    refuse_bad_name("name", chosen)
    recipe_path(file.recipe)  # an unknown recipe is reported once, not for a run
    directory = parent / chosen
    prompts = cache(load_prompts)
    runs: list[PlannedRun] = []
    with progress("planning", len(settings), is_main_process(), "runs") as advance:
        for run, one in zip(_names(directory, file.recipe, settings), settings, strict=True):
            runs.append(_plan_run(directory, run, file.recipe, grid.arguments(one), prompts, Path(recipe), over))
            advance(len(runs), "")
    _refuse_twins(runs)
    return Plan(directory, file.recipe, cells, runs)


@dataclass(frozen=True)
class SweepFile:
    """What a sweep file says. runs: settings, or small grids, each combined with the whole grid."""

    recipe: str
    name: str | None  # None for a recipe
    grid: dict[str, list[str]]
    runs: list[dict[str, list[str]]]


def read_sweep_file(path: str | Path) -> SweepFile:
    """A YAML sweep file; of a recipe's name or file, a sweep without a grid.

    Raises UserError for a file that is neither.
    """
    if not Path(path).is_file():
        return SweepFile(str(path), None, {}, [])
    loaded = read_yaml(path)
    if not {"grid", "runs", "recipe"} & loaded.keys():
        return SweepFile(str(path), None, {}, [])  # a recipe, which is checked with its settings
    for key in _strings(loaded):
        if key not in FILE_KEYS:
            near = nearest(key, FILE_KEYS)
            raise UserError(f"{path}: unknown key '{key}'; {near or 'the keys are ' + ', '.join(FILE_KEYS)}")
    recipe, name = loaded.get("recipe", "emoji"), loaded.get("name")
    for key, value in (("recipe", recipe), ("name", name)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {key} is {value!r}; give a string")
    beside = Path(path).parent / str(recipe)
    cells, runs = loaded.get("grid") or {}, loaded.get("runs") or []
    if not isinstance(cells, dict):
        raise UserError(f"{path}: grid is {cells!r}; give a mapping of keys to lists of values")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{path}: runs is {runs!r}; give a list of mappings, each with the settings of a run")
    return SweepFile(
        str(beside) if beside.is_file() else str(recipe),
        name or Path(path).stem,
        grid.written_grid(_strings(cells), f"{path}: grid"),
        [grid.written_grid(_strings(run), f"{path}: runs, entry {i}") for i, run in enumerate(runs, 1)],
    )


def _strings(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in mapping.items()}


def _names(directory: Path, recipe: str, settings: Sequence[grid.Settings]) -> list[str]:
    """A name for each run: of one that is in the directory already its own, though the grid has grown since."""
    fresh, manifest = grid.names(settings), read_manifest(directory)
    made = [entry for entry in manifest.runs if (directory / entry.name).is_dir()] if manifest is not None else []
    if not made:
        return fresh
    known = {identity(recipe, entry.settings): entry.name for entry in made}
    names = [known.get(identity(recipe, grid.arguments(one)), name) for one, name in zip(settings, fresh, strict=True)]
    taken = {entry.name for entry in made}
    return [
        grid.bounded(name, one, always=True) if name == new and name in taken and names.count(name) > 1 else name
        for name, new, one in zip(names, fresh, settings, strict=True)
    ]


def identity(recipe: str, arguments: Sequence[str]) -> str:
    """What identifies a run, however it is written: a key at its default is the same as none. Arguments that cannot be
    read stand for themselves."""
    try:
        config = settled(load_config(recipe, [*arguments]))
    except UserError:
        return json.dumps(sorted(arguments))
    return json.dumps({**to_dict(config), "name": None}, sort_keys=True)


def _plan_run(
    directory: Path, name: str, recipe: str, settings: list[str], prompts: Any, file: Path, over: Collection[str]
) -> PlannedRun:  # fmt: skip
    """file: which gave the settings, but for those of the keys `over`, which the user typed."""
    try:
        config = settled(load_config(recipe, [*settings, f"output_dir={json.dumps(str(directory))}", f"name={name}"]))
        theirs = [one for one in settings if one.partition("=")[0] not in over]
        if theirs:
            own = given_by([one for one in settings if one not in theirs])
            refuse_untrusted(config, [(file, given_by(theirs))], own)
        if saved_steps(directory / name / "checkpoints"):
            plan_run(config, [])  # refuses a key that shaped the run and has changed
        for reward in (*config.reward, *config.eval.rewards):
            refuse_unknown_reward(reward)
        micro_batch_size(config, 1)
        data: PromptSet = prompts(config.data.prompts, config.data.column)
        evaluation_set(config, data)
    except UserError as error:
        raise UserError(f"{' '.join(settings)}: {error}") from None
    return PlannedRun(name, settings, config, total_steps(config, len(data.train)))


def _refuse_twins(runs: Sequence[PlannedRun]) -> None:
    """Values that are written differently and mean the same, such as 1 and 1.0."""
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        key = json.dumps({**to_dict(run.config), "name": None}, sort_keys=True)
        if key in seen:
            raise UserError(f"{' '.join(run.settings)} is the same run as {' '.join(seen[key].settings)}; remove one")
        seen[key] = run


def _hash(recipe: str, settings: Sequence[grid.Settings]) -> str:
    return hashlib.sha256(json.dumps([recipe, settings], sort_keys=True).encode()).hexdigest()[:8]
