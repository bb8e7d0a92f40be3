"""Binds the settings of a reward in a recipe to the signature of a built-in loader or of a user's own callable."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch

from draftplus.errors import UserError

# types that a YAML value is checked against, in the words of a message
_WORDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}

_GIVEN = {
    "path": "path belongs next to args",
    "device": "the device is that of the images",
    "dtype": "the dtype is the one that all rewards compute in",
}


def parameters_of(name: str, target: Callable[..., Any]) -> list[Parameter]:
    """The parameters of the callable behind reward `name`. UserError if they cannot be inspected.

    Annotations written as strings are evaluated: all, or none if one names something that only type checkers import.
    """
    try:
        signature = inspect.signature(target)
    except ValueError as error:
        raise UserError(
            f"the parameters of reward '{name}' cannot be inspected: wrap it in a Python function."
        ) from error
    with suppress(Exception):  # an expression may raise anything
        signature = inspect.signature(target, eval_str=True)
    return list(signature.parameters.values())


def bind(
    name: str,
    parameters: Sequence[Parameter],
    path: str | None,
    args: Mapping[str, Any],
    device: Any,
    dtype: torch.dtype | None,
    hint: str = "",
) -> dict[str, Any]:
    """The keyword arguments for `parameters`: `args`, and those of path, device and dtype that are parameters.

    A path of None leaves a parameter's own default. Values are checked against annotations of str, bool, int, float,
    None and unions of these: a whole number may be passed as a float, true and false are not numbers. Other annotations
    are not checked.

    UserError for a path that no parameter takes, and for arguments that are unknown (naming the nearest), missing or of
    the wrong type. hint: a further line for the case that these are not the parameters that the user meant.
    """
    named = {one.name: one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    own = [key for key in named if key not in _GIVEN]
    takes_any = any(one.kind == one.VAR_KEYWORD for one in parameters)
    ending = f"\n{hint}" if hint else ""
    if path is not None and "path" not in named:
        raise UserError(f"reward '{name}' takes no path, but path is '{path}': remove it.{ending}")
    for key, value in args.items():
        if key in named and key in _GIVEN:
            raise UserError(f"reward '{name}': args.{key} is {value!r}; remove it, {_GIVEN[key]}.")
        if key in named:
            _check_type(name, named[key], value)
        elif not takes_any:
            near = difflib.get_close_matches(key, own, n=1)
            known = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(own) or 'no arguments'}.{ending}"
            raise UserError(f"reward '{name}' has no argument '{key}' (args.{key} is {value!r}): {known}")
    given = {"path": path, "device": device, "dtype": dtype}
    if path is None and "path" in named and named["path"].default is not Parameter.empty:
        del given["path"]
    keywords = {**{key: value for key, value in given.items() if key in named}, **args}
    for one in parameters:
        needed = one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if needed and one.name not in keywords:
            raise UserError(f"reward '{name}' needs an argument '{one.name}': add it to args.{ending}")
    return keywords


def _check_type(name: str, parameter: Parameter, value: Any) -> None:
    annotation = NoneType if parameter.annotation is None else parameter.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if any(kind not in list(_WORDS) for kind in kinds):
        return
    if value is None and parameter.default is None:  # `x: float = None`, as many write it
        return
    if not any(_fits(value, kind) for kind in kinds):
        needed = " or ".join(_WORDS[kind] for kind in kinds)
        raise UserError(f"reward '{name}': args.{parameter.name} is {value!r}; it must be {needed}.")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
