"""What a study trains: its settings, from a YAML file, and the runs that these are with every seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DONE = "done.json"  # what a finished run was made with, and how long it took
OF_FILE = {"recipe", "reward", "held_out", "seeds", "common", "early", "fixed", "lines", "drawn", "settings"}


@dataclass(frozen=True)
class Setting:
    """What distinguishes runs, apart from their seed. name: of their directory. label: in tables."""

    name: str
    label: str
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A study. reward: the trained one. held_out: one that is only measured.

    early: the setting whose evaluations are "stopped early". fixed: the rival that was chosen beforehand. lines: by
    label, the settings whose last steps a knob joins, the strongest hold first. drawn: the settings of the figure.
    """

    recipe: str
    reward: str
    settings: Mapping[str, Setting]
    common: Mapping[str, Any]
    seeds: int = 1
    held_out: str | None = None
    early: str | None = None
    fixed: str | None = None
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    drawn: Sequence[str] = ()

    @property
    def rivals(self) -> set[str]:
        """The settings that others are measured against, and that are no candidates themselves."""
        named = {name for line in self.lines.values() for name in line}
        return {*named, *(name for name in (self.early, self.fixed) if name)}


@dataclass(frozen=True)
class Task:
    """A run to train. keys: all that decides what it becomes."""

    recipe: str
    setting: str
    seed: int
    run: Path
    keys: Mapping[str, Any]
    device: str = "auto"

    @property
    def overrides(self) -> list[str]:
        """The arguments of `draftplus train`."""
        where = {"output_dir": str(self.run.parent), "name": self.run.name, "device": self.device}
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}"
                for key, value in {**self.keys, **where}.items()]  # fmt: skip

    def finished(self) -> bool:
        """Whether the run is complete, and was made with these keys."""
        told = read_done(self.run)
        return told is not None and told["recipe"] == self.recipe and told["keys"] == dict(self.keys)

    def finish(self, seconds: float) -> None:
        """Notes that the run is complete."""
        told = {"recipe": self.recipe, "keys": dict(self.keys), "device": self.device, "seconds": round(seconds, 2)}
        building = self.run / f".{DONE}"
        building.write_text(json.dumps(told), encoding="utf-8")
        building.replace(self.run / DONE)


def read_done(run: Path) -> dict[str, Any] | None:
    """What a finished run says of itself; None where it is not finished."""
    path = run / DONE
    told: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return told


def read_plan(name: str | Path, changes: Sequence[str] = (), only: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file, or of this directory's by its name.

    changes: `key=value`, over what is common to all settings. only: patterns of the names of settings; none: all.
    """
    path = Path(name) if Path(name).suffix else HERE / f"{name}.yaml"
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := set(told) - OF_FILE:
        raise ValueError(f"{path}: unknown key {sorted(unknown)[0]}; a plan has {', '.join(sorted(OF_FILE))}")
    settings = {
        name: Setting(name, one.get("label", name), {key: value for key, value in one.items() if key != "label"})
        for name, one in told.pop("settings").items()
    }
    told["common"] = {**told["common"], **dict(_change(one) for one in changes)}
    plan = Plan(settings=settings, **told)
    if missing := {*plan.rivals, *plan.drawn} - set(settings):
        raise ValueError(f"{path}: no setting is named {sorted(missing)[0]}")
    if not only:
        return plan
    chosen = {name: one for name, one in settings.items() if any(fnmatchcase(name, pattern) for pattern in only)}
    if not chosen:
        raise ValueError(f"no setting is named {', '.join(only)}; there are {', '.join(settings)}")
    return Plan(**{**vars(plan), "settings": chosen})


def _change(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def tasks_of(plan: Plan, directory: Path, seeds: Sequence[int], device: str = "auto") -> list[Task]:
    """Every run of the plan, all settings of a seed before the next, so that what is cut off is whole seeds."""
    return [
        Task(
            plan.recipe, name, seed, run_directory(directory, name, seed),
            {**plan.common, **setting.keys, "seed": seed}, device,
        )
        for seed in seeds
        for name, setting in plan.settings.items()
    ]  # fmt: skip


def run_directory(directory: Path, setting: str, seed: int) -> Path:
    """Where a run is."""
    return directory / setting / f"seed-{seed}"


def seeds_of(text: str) -> range:
    """Such as 8, which is 0 to 7, or 8:16."""
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first))
