"""YAML files and `key=value` as plain trees of dictionaries, lists and scalars, and the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from draftplus.errors import UserError

_PLAIN = re.compile(r"[\w./:+-]+")  # text that needs no quotes, unless YAML reads it as a number or the like
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not escaped; the rule is OmegaConf's


def read_yaml(path: str | Path, literally: bool = False) -> dict[Any, Any]:
    """The keys and values of a YAML file. literally: its references are texts like others, and are not refused.

    Raises UserError for a file that has something else, naming line and column; none of its content is in the message.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tree = _tree(text) if text.strip() else {}
    except PermissionError:
        raise
    except Exception as error:  # yaml's errors share no base class with OmegaConf's
        raise UserError(f"{path}: {_reason(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    if list(tree.values()) == [None] and ":" not in text:  # OmegaConf makes a key of a text alone
        raise UserError(f"{path}: not a YAML file of keys and values, such as 'seed: 1'")
    plain: dict[Any, Any] = each_text(tree, lambda text: text if literally else _unescaped(text, f"{path}: "))
    return plain


def read_value(text: str, key: str) -> Any:
    """The value that stands after `key=`, read as YAML.

    Raises UserError where it is none.
    """
    try:
        tree = _value(text)
    except Exception as error:
        raise UserError(f"{key}={text}: cannot read the value: {_reason(error)}") from None
    return each_text(tree, lambda one: _unescaped(one, f"{key}: "))


# a sweep reads the same recipe and values for each of its runs, which took most of the time of planning it
@lru_cache(maxsize=32)
def _tree(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text))


@lru_cache(maxsize=1000)
def _value(text: str) -> Any:
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    assert isinstance(tree, dict)
    return tree["value"]


def read_text(text: str) -> str | None:
    """The value of a key that holds text, as it stands after `key=`: literally, but null is no text at all.

    Text as a whole in quotes is what is between them, so that "null" in quotes is the word.
    """
    if text == "null":
        return None
    if re.fullmatch("'(?:[^']|'')*'", text):
        return text[1:-1].replace("''", "'")
    if re.fullmatch('".*"', text, re.DOTALL):
        try:
            return str(json.loads(text, strict=False))
        except ValueError:  # text that only begins and ends with a quote
            return text
    return text


def write_yaml(tree: Mapping[str, Any]) -> str:
    """A tree as YAML, which `read_yaml` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(each_text(dict(tree), _escaped)))


def written(value: Any) -> str:
    """A value as it is written after `key=`."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and list(OmegaConf.create(f"[{value}]")) == [value]:
        return value
    return json.dumps(value, ensure_ascii=False)


def each_text(tree: Any, change: Callable[[str], str]) -> Any:
    """The tree with every text in its values changed."""
    if isinstance(tree, Mapping):
        return {key: each_text(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [each_text(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def _escaped(text: str) -> str:
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _unescaped(text: str, where: str) -> str:
    if _REFERENCE.search(text):
        # what a run is made of is kept in its directory and its report, where a variable's content may be a secret
        raise UserError(
            f"{where}references such as ${{oc.env:NAME}} are not resolved, because a run's files would keep what they "
            "stand for;\nwrite the value, or give it as KEY=VALUE, where the shell resolves $NAME (as text: \\${)"
        )
    return re.sub(r"(\\*)\\\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", text)


def _reason(error: Exception) -> str:
    """Why YAML cannot be read, with its place, and without what is written there."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"not a YAML file: byte {error.start} is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "not a YAML file: too many levels within one another"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or getattr(error, "msg", None)
    reason = str(problem or getattr(error, "reason", None) or error).partition("\n")[0] or "no keys and values"
    if "no viable alternative" in reason or "token recognition" in reason:
        reason = "${ begins a reference, which is not supported; write \\${ for the text ${"
    if "mapping values" in reason:
        reason += "; put text that contains ': ' in quotes"
    if "cannot start any token" in reason:
        reason += "; indent with spaces, and put text that begins with a special character in quotes"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"not a YAML file: {place}{reason}"
