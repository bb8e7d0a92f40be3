"""The configuration as dotted keys: listing, flattening, and the nearest key to a mistyped one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

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
    """Every key in dotted form with its field (default and help)."""
    for f in dataclasses.fields(node):
        child = dataclass_of(f)
        if child is not None and f.name != "reward":
            yield from all_keys(child, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


def describe_keys() -> str:
    """One line for each key: key, default, meaning."""
    lines = []
    for key, f in all_keys():
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if key == "reward":
            default = {"emoji_clip": {"weight": 1.0, "path": None, "args": {}}}
        shown = json.dumps(default, ensure_ascii=False)
        lines.append(f"  {key + '=' + shown:<44} {f.metadata['help']}")
    return "\n".join(lines)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
