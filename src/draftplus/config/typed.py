"""Values of the type that the schema gives their keys."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args, get_origin

from draftplus.config.keys import all_keys, nearest
from draftplus.config.rewards import COMMANDS
from draftplus.config.schema import Config
from draftplus.errors import UserError

RENAMED = {"model.unet": "model.denoiser"}  # a key in runs of earlier versions -> its name now, in the same section

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_EXAMPLES: dict[Any, Any] = {int: 64, float: 0.5, bool: True, str: "words"}
_TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@cache
def hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(kind)


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def kind_at(path: Sequence[str], kind: Any = Config) -> Any:
    """The type of a dotted key's value; None where there is no such key."""
    if not path:
        return kind
    kind, _ = _without_none(kind)
    if _is_section(kind):
        return kind_at(path[1:], hints(kind)[path[0]]) if path[0] in hints(kind) else None
    return kind_at(path[1:], get_args(kind)[1]) if get_origin(kind) is dict else None


def is_text(key: str, schema: Any = Config) -> bool:
    """Whether the value of a dotted key is text."""
    return _without_none(kind_at(key.split("."), schema))[0] is str


def assigned(kind: Any, value: Any, old: Any, key: str, shown: str = "", schema: Any = Config) -> Any:
    """The value as one of type `kind`. old: what it changes, where it is a section or a mapping; None: the defaults.

    shown: what stands before the key in a message, such as the file. schema: whose keys are known.

    Raises UserError for an unknown key (naming the nearest), and for a value of another type, with an example of one.
    """
    kind, optional = _without_none(kind)
    if kind is Any:
        return joined(old, value, f"{shown}{key}")
    if value is None and optional:
        return None
    if _is_section(kind) and isinstance(value, Mapping):
        old = old if isinstance(old, kind) else kind()
        for name in value:
            if name not in hints(kind):
                dotted = f"{key}.{name}" if key else str(name)
                raise UserError(f"{shown}{_unknown(dotted, kind, key, bool(shown), schema)}")
        news = {
            name: assigned(hints(kind)[name], one, getattr(old, name), f"{key}.{name}" if key else name, shown, schema)
            for name, one in value.items()
        }
        return dataclasses.replace(old, **news)
    if get_origin(kind) is dict and isinstance(value, Mapping):
        inner, known = get_args(kind)[1], dict(old or {})
        for name, one in value.items():
            if not isinstance(name, str):
                raise UserError(f"{shown}{key}: the name {name!r} is not text; write it in quotes")
            known[name] = assigned(inner, one, known.get(name), f"{key}.{name}", shown, schema)
        return known
    if get_origin(kind) is list and isinstance(value, (list, tuple)):
        return [assigned(get_args(kind)[0], one, None, f"{key}[{i}]", shown, schema) for i, one in enumerate(value)]
    found = _scalar(kind, value, f"{shown}{key}")
    if found is None:
        raise UserError(f"{shown}{key}: {_short(value)} is not {_wanted(kind)}{_example(key, kind)}")
    return found


def _scalar(kind: Any, value: Any, where: str) -> Any:
    """The value of a simple type; None where it is of another."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        _refuse_odd(value, where)
    if kind is str:
        if isinstance(value, (bool, int, float)):
            raise UserError(
                f"{where}: YAML reads this word as {_short(value)}, but it must be text; write it in quotes, as it is"
            )
        return value if isinstance(value, str) else None
    if kind is bool:
        return _TRUTHS.get(str(value).lower()) if isinstance(value, (bool, int, str)) else None
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, (int, str, kind)):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            return None
    return None


def joined(old: Any, value: Any, where: str) -> Any:
    """A value of any type. Mappings are merged into those that are there."""
    if isinstance(value, Mapping):
        before = old if isinstance(old, dict) else {}
        return {**before, **{name: joined(before.get(name), one, f"{where}.{name}") for name, one in value.items()}}
    if isinstance(value, (list, tuple)):
        return [joined(None, one, where) for one in value]
    if isinstance(value, str):
        _refuse_odd(value, where)
    return value


def _refuse_odd(text: str, where: str) -> None:
    if text == "???":
        raise UserError(f"{where} is ???, which stands for a value that is still missing; give one")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {text!r} is not valid Unicode text; write it again, as UTF-8") from None


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was allowed."""
    if isinstance(kind, types.UnionType):
        [rest] = [one for one in get_args(kind) if one is not type(None)]
        return rest, True
    return kind, False


def _wanted(kind: Any) -> str:
    if _is_section(kind):
        return f"a section; its keys are {', '.join(hints(kind))}"
    if get_origin(kind) is list:
        return f"a list, each {_WORDS.get(get_args(kind)[0], 'a mapping')}"
    return "a mapping from names to settings" if get_origin(kind) is dict else _WORDS[kind]


def _example(key: str, kind: Any) -> str:
    key, entry, _ = key.partition("[")  # of a list, the whole
    field = dict(all_keys()).get(key)
    if entry and field is None:
        return ""
    if _is_section(kind) and not entry:
        name = next(iter(hints(kind)))
        default = getattr(kind(), name)
        shown = _EXAMPLES[str] if default is None else default
        return f"; for example, {key}.{name}={shown if isinstance(shown, str) else json.dumps(shown)}"
    if get_origin(kind) is dict and not entry:
        return f"; for example, {key}={{jpeg_compressibility: {{}}}}"
    default = None
    if field is not None:
        default = field.default_factory() if callable(field.default_factory) else field.default
    value = default if default is not None else [_EXAMPLES.get(kind)] if entry else _EXAMPLES.get(kind)
    return f"; for example, {key}={value if isinstance(value, str) else json.dumps(value)}"


def _short(value: Any) -> str:
    if value is None:
        return "null"
    try:
        text = repr(value) if not isinstance(value, bool) else str(value).lower()
    except ValueError:  # an integer of thousands of digits
        text = "this number"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _unknown(key: str, kind: Any, section: str, from_file: bool, schema: Any) -> str:
    if from_file and not (len(key) <= 80 and all(c.isalnum() or c in "_-." for c in key)):
        # it may be a line of a file that is no recipe at all, and none of our business
        return "a key that is no plain word, so this is not a recipe; keys and values look like 'seed: 1'"
    if key in RENAMED:
        return f"unknown key '{key}'; it is now called '{RENAMED[key]}'"
    near = nearest(
        key, [*(k for k, _ in all_keys(schema)), *(f"{section}.{name}" if section else name for name in hints(kind))]
    )
    return f"unknown key '{key}'; {near or f'{COMMANDS[schema]} --help lists all keys'}"
