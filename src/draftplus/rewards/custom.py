"""A user's own reward, named in a recipe as `package.module:object`."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.config import refuse_library
from draftplus.errors import UserError
from draftplus.rewards.arguments import bind, parameters_of
from draftplus.rewards.unharmed import Unharmed
from draftplus.types import Reward

_HINT = (
    "A function whose first two parameters are named images and prompts is the reward; anything else is called with "
    "args to create it. A path goes to a parameter named path."
)


@dataclass
class CustomReward:
    """A user's function with its arguments bound, and the flags that a plain function need not have."""

    function: Callable[..., Tensor]
    args: Mapping[str, Any]
    differentiable: bool
    compares_images: bool
    unharmed: Unharmed
    divisible: Sequence[torch.nn.Module] = ()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images: (b, 3, H, W) in [0, 1]; prompts: b strings. Returns (b,)."""
        with self.unharmed("when it was called"):
            # copies, since what it does in place would be in the saved pictures and in the next reward's score
            return self.function(images.clone(), list(prompts), **self.args)


def load_custom(spec: str, path: str | None, args: Mapping[str, Any], device: Any, dtype: torch.dtype | None) -> Reward:
    """Resolves `package.module:object`; modules in the working directory can be imported.

    - A function whose first two parameters are named `images` and `prompts` is the reward itself; `args` are bound as
      keywords.
    - Anything else, a class or another function, creates the reward: it is called once with `args` as keywords and must
      return a callable that takes `(images, prompts)`.
    - `path`, `device` and `dtype` of the configuration are passed too if the signature has parameters of these names.
    - `differentiable` is True unless the reward, or the callable that created it, has this attribute set to False.
    - `compares_images` is False unless the named object has this attribute set to True.
    - `divisible` is what the reward has as this attribute, networks in a list or tuple; else empty.
    - A reward that is an `nn.Module` is frozen and put into evaluation mode.

    UserError for a missing module or object, one that cannot be called, arguments that do not fit, a `divisible` that
    lists no networks, and a reward that compares images although the named object does not say so. Exceptions of the
    user's own code pass through.
    """
    target, unharmed = resolve_custom(spec), Unharmed(spec)
    if not callable(target):
        raise UserError(f"reward '{spec}' is of type {type(target).__name__}: it must be a function or a class.")
    parameters = parameters_of(spec, target)
    itself = not inspect.isclass(target) and [one.name for one in parameters[:2]] == ["images", "prompts"]
    keywords = bind(spec, parameters[2:] if itself else parameters, path, args, device, dtype, _HINT)
    compares = bool(getattr(target, "compares_images", False))
    if itself:
        differentiable = bool(getattr(target, "differentiable", True))
        return CustomReward(target, keywords, differentiable, compares, unharmed, _divisible(spec, target))
    with unharmed("when it was made"):
        made = target(**keywords)
    if not callable(made):
        raise UserError(
            f"reward '{spec}' returned an object of type {type(made).__name__}, which cannot be called with "
            "(images, prompts).\n"
            "If it is the reward itself, name its first two parameters images and prompts."
        )
    if getattr(made, "compares_images", False) and not compares:
        raise UserError(
            f"reward '{spec}' returned a reward that compares images, which must be known before it is created:\n"
            f"set {spec.partition(':')[2]}.compares_images = True in its module."
        )
    if isinstance(made, torch.nn.Module):
        made.requires_grad_(False).eval()
    differentiable = bool(getattr(made, "differentiable", getattr(target, "differentiable", True)))
    return CustomReward(made, {}, differentiable, compares, unharmed, _divisible(spec, made))


def _divisible(spec: str, reward: Any) -> Sequence[torch.nn.Module]:
    listed = getattr(reward, "divisible", ())
    containers = (torch.nn.ModuleList, torch.nn.ModuleDict)  # which cannot be called
    for one in listed if isinstance(listed, (list, tuple)) else [listed]:
        if not isinstance(one, torch.nn.Module) or isinstance(one, containers) or one is listed:
            raise UserError(
                f"reward '{spec}': its divisible is {type(one).__name__}, or has one; it must be a list of networks, "
                "each a torch module that can be called."
            )
    return listed


def resolve_custom(spec: str) -> Any:
    """The object that `package.module:object` names; modules in the working directory can be imported.

    UserError if there is no such module or object, or importing the module fails, with its file and line.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise UserError(f"reward '{spec}' is not of the form package.module:object")
    refuse_library(spec)
    try:
        with _working_directory_first(), Unharmed(spec)("when it was imported"):
            target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # a module that it imports itself
            raise UserError(_broken(spec, error)) from error
        raise UserError(
            f"reward '{spec}': there is no module '{error.name}' in {Path.cwd()}, nor is one installed."
        ) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(_broken(spec, error)) from error
    for name in attribute.split("."):
        try:
            target = getattr(target, name)
        except AttributeError as error:
            raise UserError(
                f"reward '{spec}': module '{module_name}' has no '{attribute}'; check the name after the colon."
            ) from error
    if inspect.isbuiltin(target) or _is_of_python(target):
        raise UserError(f"reward '{spec}' is a function of Python or of a C library, and none of these is a reward.")
    return target


def _is_of_python(target: Any) -> bool:
    if not (inspect.isroutine(target) or inspect.isclass(target)):  # an object is its module's own, a partial say
        return False
    return (getattr(target, "__module__", None) or "").partition(".")[0] in sys.stdlib_module_names


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Inside, modules in the working directory come first; afterwards last, for what a reward imports as it is called,
    so that no file there takes the place of a library's."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


def _broken(spec: str, error: BaseException) -> str:
    """Which line of the user's own files fails on import, and how."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    here = [frame for frame in frames[1:] if Path(frame.filename).is_relative_to(Path.cwd())] or frames
    file, line, what = here[-1].filename, here[-1].lineno, str(error)
    if isinstance(error, SyntaxError):
        file, line, what = error.filename or file, error.lineno or line, error.msg
    reason = what.splitlines()[0] if what else ""
    return f"reward '{spec}' cannot be imported: {file}, line {line}: {type(error).__name__}: {reason}".rstrip(": ")
