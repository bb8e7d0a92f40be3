"""Runs into what a figure shows: one comparison for each base model and evaluation, methods, points over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftplus.config import (
    BASE_MODEL,
    Config,
    RewardConfig,
    base_model_of,
    flatten,
    is_below,
    keys_that_affect,
    keys_where,
    to_dict,
)
from draftplus.report.read import Run
from draftplus.report.wording import kl_coefficients, method_label, setting

# keys of how a run is watched and stored, which change nothing of what it becomes
BESIDE = keys_that_affect("conduct", "record")
MISSING = "no such key"  # null is a value of its own
OF_MODEL = keys_where(lambda facts: facts.of_model)  # no run has their defaults, which are null
WEIGHTED = {"noise_level": "noise level", "path": "divergence"}  # values of objective.kl_weights
METHOD_KEYS = keys_where(lambda facts: facts.in_method_name)


@dataclass
class Group:
    """Runs that differ in nothing but their seed, one of each.

    short: those that did not get as far as the others, and copies: those whose seed another has; both are left out.
    kl_coeff: the coefficient that its method's line is over, called `symbol`: β of the steps with gradient, or λ of the
    others. plain: the method's name at a coefficient of 0; plain_coeff: the coefficient that it then has of its own.
    """

    method: str
    kl_coeff: float
    runs: list[Run]
    short: list[Run] = field(default_factory=list)
    copies: list[Run] = field(default_factory=list)
    plain: str = ""
    plain_coeff: float = 0.0
    symbol: str = "β"

    @property
    def label(self) -> str:
        """The method, with its KL coefficient where it has one."""
        return f"{self.method}, {self.symbol} = {self.kl_coeff:g}" if self.kl_coeff > 0 else self.method


@dataclass
class Comparison:
    """Runs that one figure can show: the same base model, evaluated on the same prompts with as many images."""

    title: str
    runs: list[Run]
    groups: list[Group] = field(default_factory=list)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """The runs, separated by base model and evaluation, each set grouped by method and over seeds."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        sets.setdefault(_world(run), []).append(run)
    told = []
    for members in sets.values():
        flat = flatten(members[0].config)
        told.append(Comparison(_title(members[0], flat), members, _groups(members)))
    return told


def _world(run: Run) -> str:
    flat = flatten(run.config)
    return json.dumps([base_model_of(flat), evaluated_prompts(run), flat.get("eval.images_per_prompt")])


def evaluated_prompts(run: Run) -> list[str]:
    """The prompts that the run was evaluated on, in their order, which their seeds depend on."""
    return next((prompts for one in run.evaluations if (prompts := one.held_out.prompts)), run.prompts)


def _title(run: Run, flat: dict[str, Any]) -> str:
    path = str(flat.get("model.path"))
    name = Path(path).name if "/" in path and Path(path).exists() else path
    replaced = [key for key in BASE_MODEL if key not in ("model.path", "model.dtype") and flat.get(key)]
    changed = [f"{key.partition('.')[2]} {flat[key]}" for key in replaced]
    images = flat.get("eval.images_per_prompt")
    prompts = evaluated_prompts(run)
    told = f"{len(prompts)} held-out prompt{'s' * (len(prompts) > 1)}" if prompts else "no evaluation"
    if len(prompts) == 1:
        told += f" (“{prompts[0]}”)"
    return f"Model {', '.join([name, *changed])}; {told}" + (f", {images} images of each" if prompts else "")


def settings_of(run: Run) -> dict[str, Any]:
    """The dotted keys that make a run what it is, without its seed."""
    flat = flatten(run.config)
    return {k: v for k, v in flat.items() if k != "seed" and not is_below(k, BESIDE)}


def seed_of(run: Run) -> Any:
    """The seed of a run."""
    return run.config.get("seed")


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The keys whose values are not the same in all runs, in the order of the configuration."""
    flats = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [key for key in keys if len({json.dumps(flat.get(key, MISSING), sort_keys=True) for flat in flats}) > 1]


def method_name(flat: dict[str, Any]) -> str:
    """The method's name as the papers write it, such as DRaFT-2 or DRaFT+."""
    method, k = str(flat.get("objective.method")), flat.get("objective.grad_steps")
    steps, (window, prefix) = flat.get("sampler.steps"), kl_coefficients(flat)
    with_kl = window > 0 or prefix > 0
    name = method_label(method)
    if method != "draft":
        name += " with KL" if with_kl else ""
    elif with_kl:
        name = "DRaFT+" if k == 1 else f"DRaFT+ (K = {k})"
    else:
        name = "DRaFT" if k in ("all", steps) else f"DRaFT-{k}"
    if prefix > 0:
        tied = flat.get("objective.kl_prefix_coeff") is None
        name += " on the whole path" if tied else " on the path" + (f" (β = {window:g})" if window > 0 else "")
        name += f" weighted by {WEIGHTED[weights]}" if (weights := flat.get("objective.kl_weights")) in WEIGHTED else ""
    if with_kl and flat.get("objective.kl_space") in ("x0", "velocity"):
        name += f" in {flat['objective.kl_space']} space"
    gate = flat.get("objective.gate") or 0
    return f"{name}, gate {gate:g}" if gate else name


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Groups in order of method and KL coefficient; what else differs among runs of one method is in its name."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(method_name(flatten(run.config)), []).append(run)
    groups: dict[str, Group] = {}
    for method, members in by_method.items():
        told_by_name = [key for key in METHOD_KEYS if key != "objective.grad_steps" or method.startswith("DRaFT")]
        keys = [key for key in differing_keys(members) if key not in told_by_name]
        names = _names(members, keys)
        for run in members:
            flat, more = settings_of(run), names[id(run)]
            kl, key, rest, symbol = _coefficient(flat)
            plain = ", ".join([method_name({**flat, key: 0}), *more])
            identity = json.dumps([method, kl, [flat.get(key, MISSING) for key in keys]], sort_keys=True, default=str)
            made = Group(", ".join([method, *more]), kl, [], plain=plain, plain_coeff=rest, symbol=symbol)
            groups.setdefault(identity, made).runs.append(run)
    told = sorted(groups.values(), key=lambda group: (_order(group.method), group.method, group.kl_coeff))
    for group in told:
        _set_short_aside(group)
        _set_copies_aside(group)
    return told


def _coefficient(flat: Mapping[str, Any]) -> tuple[float, str, float, str]:
    """The KL coefficient that a run's line is over, its key, the one that is left where it is 0, and its symbol."""
    window, prefix = kl_coefficients(flat)
    if prefix > 0 and flat.get("objective.kl_prefix_coeff") is not None:
        return float(prefix), "objective.kl_prefix_coeff", float(window), "λ"
    return float(window), "objective.kl_coeff", 0.0, "β"


def _names(runs: Sequence[Run], keys: Sequence[str]) -> dict[int, list[str]]:
    """What is said of each run besides its method, by id(): no more of its rewards than tells all apart."""
    flats = {id(run): settings_of(run) for run in runs}
    identities = {json.dumps([flat.get(key, MISSING) for key in keys], default=str) for flat in flats.values()}
    shared = set.intersection(*(set(map(str, run.config.get("reward") or {})) for run in runs))
    own = [f"reward.{name}." for name in shared]  # of other rewards it is enough to say that they are there
    common = [key for key in keys if not key.startswith("reward.") or key.startswith(tuple(own))]
    usual = {**flatten(to_dict(Config())), **{key: flats[id(runs[0])].get(key) for key in OF_MODEL}}
    brief = {id(run): _told(run, flats[id(run)], keys, common, usual) for run in runs}
    if len({tuple(parts) for parts in brief.values()}) == len(identities):
        return brief
    return {id(run): _told(run, flats[id(run)], keys, keys, usual) for run in runs}


def _told(
    run: Run, flat: dict[str, Any], keys: Sequence[str], told: Sequence[str], defaults: Mapping[str, Any]
) -> list[str]:
    """What differs and is not at its default, in words; which rewards there are is told by their names.

    keys: those that differ between the runs. told: those of them whose values are said. defaults: by key; where the
    model decides, what it is in the first of the runs.
    """
    plain = flatten(to_dict(RewardConfig()))
    own = [key for key in keys if key in flat]
    parts = []
    if len(own) < len(keys) or any(key.startswith("reward.") and key not in defaults for key in own):
        names = list(run.config.get("reward") or {})
        parts = [f"reward {' + '.join(map(str, names))}"] if names != list(Config().reward) else []
    for key in [key for key in own if key in told or not key.startswith("reward.")]:
        of_reward = next((name for name in run.config.get("reward") or {} if key.startswith(f"reward.{name}.")), None)
        usual = defaults.get(key, MISSING)
        if usual == MISSING and of_reward is not None:
            usual = plain.get(key.removeprefix(f"reward.{of_reward}."), MISSING)
        if flat[key] != usual and flat[key] != {}:
            last = key.rpartition(".")[2]
            shared = sum(other.rpartition(".")[2] == last for other in keys) > 1
            parts.append(f"{key if shared else last} {setting(flat[key])}")
    return parts


def _order(method: str) -> int:
    names = ("DRaFT-1", "DRaFT", "DRaFT-LV", "DRaFT+", "DDPO")
    name = method.partition(",")[0]
    if name.startswith("DRaFT+"):
        return names.index("DRaFT+")
    return names.index(name) if name in names else 1 if "DRaFT-" in method else 9


def last_step(run: Run) -> int:
    """The last evaluated step; -1 where there is none."""
    return run.evaluations[-1].step if run.evaluations else -1


def finished(run: Run) -> bool:
    """Whether the run got to its end, or a guard ended it."""
    planned = None if flatten(run.config).get("train.epochs") else flatten(run.config).get("train.steps")
    if run.stopped:
        return True
    if isinstance(planned, int):  # a run that goes on past an earlier end has that end's adapter
        return last_step(run) >= planned
    return (run.directory / "adapter").is_dir()


def _set_short_aside(group: Group) -> None:
    whole = [run for run in group.runs if finished(run) and run.evaluations]
    if whole:
        group.short = [run for run in group.runs if run not in whole]
        group.runs = whole


def _set_copies_aside(group: Group) -> None:
    """The same settings and the same seed are the same run, and no second seed."""
    first: dict[str, Run] = {}
    for run in group.runs:
        if first.setdefault(str(seed_of(run)), run) is not run:
            group.copies.append(run)
    group.runs = list(first.values())


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. error: one standard error over seeds; None where there is one seed."""

    value: float
    error: float | None = None
    count: int = 1


def mean_over(values: Sequence[float]) -> Mean | None:
    """The mean over seeds and its standard error; None without a finite value."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return None
    mean = sum(kept) / len(kept)
    if len(kept) == 1:
        return Mean(mean)
    variance = sum((value - mean) ** 2 for value in kept) / (len(kept) - 1)
    return Mean(mean, math.sqrt(variance / len(kept)), len(kept))
