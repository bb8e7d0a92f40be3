"""A grid of settings: reading `KEY=V1,V2`, the product of all, and a short name for each run."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from draftplus.config import KNOBS, is_below, is_text, keys_that_affect, written
from draftplus.errors import UserError

MOST_RUNS = 1000
LONGEST_NAME = 80

Settings = dict[str, str]  # key -> value, as they are written in KEY=VALUE

CLOSES = {"(": ")", "[": "]", "{": "}"}
OWNED = {"name": "each run is named after its settings", "output_dir": "the runs go to the sweep's own directory"}


def split_values(text: str) -> list[str]:
    """The values between commas; a comma inside brackets, braces or quotes belongs to the value.

    Raises UserError for brackets or quotes that do not close, and for an empty value.
    """
    values, start, waiting, quote = [], 0, [], ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in CLOSES:
            waiting.append(CLOSES[character])
        elif character in CLOSES.values():
            if not waiting or waiting.pop() != character:
                raise UserError(f"'{text}': the opening bracket for '{character}' is missing")
        elif character == "," and not waiting:
            values.append(text[start:i].strip())
            start = i + 1
    values.append(text[start:].strip())
    if quote or waiting:
        raise UserError(f"'{text}': the closing {quote or waiting[-1]} is missing")
    if "" in values:
        raise UserError(f"'{text}': a value is empty; write null or \"\" if that is what you mean")
    return values


def parse_grid(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Each key's values, from `KEY=V1,V2` arguments.

    Raises UserError for an argument without a key or a value, and for a key that is given twice.
    """
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, values = argument.partition("=")
        if not equals or not key or not values.strip():
            raise UserError(f"'{argument}': expected KEY=V1,V2,..., such as objective.kl_coeff=0,1,10")
        if key in grid:
            raise UserError(
                f"{key} is given twice ({','.join(grid[key])} and {values}); give all values in one argument"
            )
        try:
            grid[key] = split_values(values)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return grid


def written_grid(grid: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """A grid whose values may be lists, as text. A value that is itself a list stands in a list of its own.

    Raises UserError for a key without values, and for a word of a text key that YAML takes for something else.
    """
    told: dict[str, list[str]] = {}
    for key, values in grid.items():
        many = list(values) if isinstance(values, (list, tuple, range)) else [values]
        if not many:
            raise UserError(f"{where}: {key} has no values; give at least one")
        for value in many:
            if is_text(str(key)) and isinstance(value, (bool, int, float)):
                raise UserError(
                    f"{where}: YAML reads a word of {key} as {value}; write it in quotes, because it is text"
                )
        told[str(key)] = [written(value) for value in many]
    return told


def with_variants(grid: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The grid with its knobs, such as lora_scale, as `eval.variants` of each run: they need no training of their own.

    Raises UserError where the grid has `eval.variants` too.
    """
    knobs = {key: values for key, values in grid.items() if key in KNOBS}
    if not knobs:
        return {key: list(values) for key, values in grid.items()}
    if "eval.variants" in grid:
        raise UserError(f"{min(knobs)} and eval.variants are both in the grid; list all ways to sample in one of them")
    given = [f"{key}={value}" for key, values in knobs.items() for value in values]
    try:
        variants = [OmegaConf.to_container(OmegaConf.from_dotlist([text])) for text in given]
    except Exception as error:  # yaml's errors share no base class with OmegaConf's
        raise UserError(f"{', '.join(given)}: a value cannot be read: {str(error).splitlines()[0]}") from None
    told: dict[str, list[str]] = {}
    for key, values in grid.items():
        if key not in KNOBS:
            told[key] = list(values)
        elif "eval.variants" not in told:
            told["eval.variants"] = [json.dumps(variants)]
    return told


def expand(grid: Mapping[str, Sequence[str]], runs: Sequence[Mapping[str, Sequence[str]]] = ()) -> list[Settings]:
    """The settings of each run: every combination of the grid, with each of `runs`, small grids of their own.

    Raises UserError if there is no run, there are more than 1,000 or the same one twice, and for a key that is in both
    the grid and a run, or that the sweep sets itself.
    """
    if not grid and not any(runs):
        raise UserError("the grid is empty; give at least one KEY=V1,V2,..., such as objective.kl_coeff=0,1,10")
    grids = []
    for own in runs or [{}]:
        for key in own.keys() & grid.keys():
            raise UserError(
                f"{key} is in the grid ({', '.join(grid[key])}) and in a run ({', '.join(own[key])}); remove one"
            )
        grids.append({**own, **grid})
    for key, why in OWNED.items():
        for one in grids:
            if key in one:
                raise UserError(f"{key}={','.join(one[key])}: a sweep cannot range over {key}; {why}")
    count = sum(_size(one) for one in grids)
    if count > MOST_RUNS:
        sizes = ", ".join(f"{key}: {len(values)}" for key, values in grids[0].items() if len(values) > 1)
        raise UserError(f"the grid has {count:,} runs ({sizes}); a sweep can have at most {MOST_RUNS:,}")
    expanded = [dict(zip(one, values, strict=True)) for one in grids for values in itertools.product(*one.values())]
    for i, settings in enumerate(expanded):
        if settings in expanded[:i]:
            raise UserError(f"{' '.join(arguments(settings))} is in the sweep twice; give each value once")
    return expanded


def _size(grid: Mapping[str, Sequence[str]]) -> int:
    size = 1
    for values in grid.values():
        size *= len(values)
    return size


def arguments(settings: Settings) -> list[str]:
    """KEY=VALUE for each setting."""
    return [f"{key}={value}" for key, value in settings.items()]


def names(runs: Sequence[Settings]) -> list[str]:
    """A short, unique directory name for each run, from the settings that differ between the runs.

    It has no `=`, so that `draftplus train DIRECTORY` is not mistaken for a setting.
    """
    keys = list(dict.fromkeys(key for settings in runs for key in settings))
    differing = [key for key in keys if len({settings.get(key) for settings in runs}) > 1] or keys
    differing = [key for key in differing if not is_below(key, keys_that_affect("record"))] or differing
    short = _short_keys(differing)
    told = []
    for settings in runs:
        parts = [f"{short[key]}-{_slug(settings[key])}" for key in settings if key in differing]
        told.append(bounded("_".join(parts) or "base", settings))
    return [
        name if told.count(name) == 1 else bounded(name, settings, always=True)
        for name, settings in zip(told, runs, strict=True)
    ]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last parts, as few as tell it from the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            tail = parts[-n:]
            if sum(other.split(".")[-n:] == tail for other in keys) == 1:
                break
        short[key] = _slug(".".join(tail))
    return short


def _slug(text: str) -> str:
    kept = re.sub(r"[^A-Za-z0-9._-]+", " ", text)  # a minus stays, also in front
    return re.sub(r"\s+", "-", kept.strip()) or "empty"


def bounded(name: str, settings: Settings, always: bool = False) -> str:
    """The name, cut and with a hash of the settings where it is too long, or always."""
    if len(name) <= LONGEST_NAME and not always:
        return name
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-_.')}-{digest}"
