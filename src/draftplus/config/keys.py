"""The configuration as dotted keys: all of them, those of a kind, their values, and the nearest to a mistyped one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from draftplus.config.facts import Affects, Facts, facts_of
from draftplus.config.reading import write_yaml
from draftplus.config.schema import Config


def dataclass_of(f: dataclasses.Field[Any]) -> Any:
    factory = f.default_factory
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def nearest(word: str, candidates: Sequence[str]) -> str:
    """'did you mean …?', comparing whole keys and their last parts; empty where nothing is near."""
    tails = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    found = difflib.get_close_matches(word, candidates, 1, 0.75)
    found = found or [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), 1, 0.6)]
    found = found or difflib.get_close_matches(word, candidates, 1, 0.5)
    return f"did you mean '{found[0]}'?" if found else ""


def all_keys(node: Any = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key in dotted form with its field (default and facts)."""
    for f in dataclasses.fields(node):
        child = dataclass_of(f)
        if child is not None:
            yield from all_keys(child, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


def choices_of(key: str) -> tuple[str, ...]:
    """The texts that a key may be; empty where it may be any."""
    return facts_of(dict(all_keys())[key]).choices


def keys_where(
    holds: Callable[[Facts], bool], node: Any = Config, prefix: str = "", affects: Affects = "trajectory"
) -> tuple[str, ...]:
    """The keys of whose facts something holds, in order; a section stands for its keys where it holds of all."""
    found: list[str] = []
    for f in dataclasses.fields(node):
        name, child, facts = f"{prefix}{f.name}", dataclass_of(f), facts_of(f)
        here = facts.affects or affects
        if child is not None:
            below = keys_where(holds, child, f"{name}.", here)
            found += [name] if below == tuple(f"{name}.{g.name}" for g in dataclasses.fields(child)) else below
        elif holds(dataclasses.replace(facts, affects=here)):
            found.append(name)
    return tuple(found)


def keys_that_affect(*what: Affects, node: Any = Config) -> tuple[str, ...]:
    """The keys that change one of these, in order; a section stands for its keys where all do."""
    return keys_where(lambda facts: facts.affects in what, node)


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether a key is one of `keys` or lies below one."""
    return f"{key}.".startswith(tuple(f"{one}." for one in keys))


def changeable_keys(node: Any = Config) -> tuple[str, ...]:
    """Those that may change when a run is continued."""
    return keys_that_affect("length", "conduct", "record", node=node)


CHANGEABLE = changeable_keys()
BASE_MODEL = keys_where(lambda facts: facts.base_model)  # what is tuned
ADDED = keys_where(lambda facts: facts.added)


def base_model_of(flat: Mapping[str, Any]) -> list[Any]:
    """What is tuned, by a configuration's dotted keys: one value for each key, of later keys only where it is set.

    So files that an earlier version wrote still compare as equal.
    """
    return [flat.get(key) for key in BASE_MODEL if key not in ADDED or flat.get(key)]


def describe_keys(node: Any = Config) -> str:
    """One line for each key: key, default, meaning."""
    lines = []
    for key, f in all_keys(node):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        shown = json.dumps(default, ensure_ascii=False, default=dataclasses.asdict)
        lines.append(f"  {key + '=' + shown:<44} {facts_of(f).meaning}")
    return "\n".join(lines)


def values(node: Any, prefix: str = "") -> Iterator[tuple[str, Facts, Any]]:
    """The keys that a configuration has, those of each reward too, with their facts and values."""
    for f in dataclasses.fields(node):
        name, value = f"{prefix}{f.name}", getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from values(value, f"{name}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for entry, settings in value.items():
                yield from values(settings, f"{name}.{entry}.")
        else:
            yield name, facts_of(f), value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A complete configuration, of any task, as YAML; `load_config` reads it back."""
    return write_yaml(to_dict(config))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def file_keys(config: Any) -> set[str]:
    """The keys that name files or directories, those of its rewards too."""
    return {key for key, facts, _ in values(config) if facts.file}
