"""A recipe's path and args against signatures: what passes, and what is said of the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import pytest
import torch

from draftplus.build import build_reward
from draftplus.config import RewardConfig
from draftplus.errors import UserError
from draftplus.rewards.arguments import bind, parameters_of
from tests.tiny import CPU

if TYPE_CHECKING:
    from nowhere import Unknown


def typed(
    *, text: str = "", number: float = 0.0, count: int = 0, flag: bool = False, maybe: str | None = None,
    either: Optional[int | str] = 0, implied: float = None, file: str | Path = "", anything: Any = 0, bare=0,  # noqa: UP045, RUF013
) -> None:  # fmt: skip
    """One parameter of each kind."""


def located(path: str, device: torch.device, *, gain: float = 1.0) -> None:
    """Names two of the three that are given."""


def defaulted(path: str = "own", dtype: torch.dtype | None = None) -> None:
    """Has weights of its own."""


def open_ended(needed: int, **rest: Any) -> None:
    """Takes any name."""


def half_known(weights: Unknown = None, gain: float = 1.0) -> None:
    """One annotation cannot be evaluated, and so none is."""


def bound(target: Callable[..., Any], path: str | None = None, hint: str = "", **args: Any) -> dict[str, Any]:
    return bind("r", parameters_of("r", target), path, args, CPU, torch.float32, hint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", "a"), ("number", 0.5), ("number", 3), ("count", 3), ("flag", True), ("maybe", None), ("maybe", "a"),
        ("either", 3), ("either", "a"), ("either", None), ("implied", None), ("implied", 2), ("file", 3),
        ("anything", [1]), ("bare", {}),
    ],
)  # fmt: skip
def test_what_fits_is_passed_as_it_is(key: str, value: object) -> None:
    assert bound(typed, **{key: value}) == {key: value} and type(bound(typed, **{key: value})[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("text", 3, "a string"), ("text", None, "a string"), ("text", True, "a string"), ("number", "0.5", "a number"),
        ("number", True, "a number"), ("number", None, "a number"), ("count", 3.0, "a whole number"),
        ("count", False, "a whole number"), ("flag", 1, "true or false"), ("flag", "yes", "true or false"),
        ("maybe", 3, "a string or null"), ("either", 0.5, "a whole number or a string or null"),
        ("implied", "a", "a number"),
    ],
)  # fmt: skip
def test_another_type_is_named(key: str, value: object, needed: str) -> None:
    with pytest.raises(UserError) as error:
        bound(typed, **{key: value})
    assert str(error.value) == f"reward 'r': args.{key} is {value!r}; it must be {needed}."


def test_path_device_and_dtype_where_they_are_named() -> None:
    assert bound(located, "weights", gain=2.0) == {"path": "weights", "device": CPU, "gain": 2.0}
    assert bound(located) == {"path": None, "device": CPU}
    assert bound(defaulted) == {"dtype": torch.float32}
    assert bound(defaulted, "weights") == {"path": "weights", "dtype": torch.float32}
    assert bound(open_ended, needed=1, more=[2]) == {"needed": 1, "more": [2]}


def test_the_type_of_what_cannot_be_read_is_not_checked() -> None:
    assert bound(half_known, gain="much") == {"gain": "much"}


@pytest.mark.parametrize(
    ("target", "given", "said"),
    [
        (typed, {"cuont": 1}, "reward 'r' has no argument 'cuont' (args.cuont is 1): did you mean 'count'?"),
        (located, {"x": 1}, "reward 'r' has no argument 'x' (args.x is 1): it takes gain."),
        (
            defaulted,
            {"x": 1, "hint": "So."},
            "reward 'r' has no argument 'x' (args.x is 1): it takes no arguments.\nSo.",
        ),
        (open_ended, {}, "reward 'r' needs an argument 'needed': add it to args."),
        (open_ended, {"hint": "So."}, "reward 'r' needs an argument 'needed': add it to args.\nSo."),
        (typed, {"path": "w"}, "reward 'r' takes no path, but path is 'w': remove it."),
        (open_ended, {"path": "w", "hint": "So."}, "reward 'r' takes no path, but path is 'w': remove it.\nSo."),
        (
            located,
            {"device": "cuda"},
            "reward 'r': args.device is 'cuda'; remove it, the device is that of the images.",
        ),
    ],
)
def test_what_does_not_fit_is_said(target: Callable[..., Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        bound(target, **given)
    assert str(error.value) == said


def test_a_path_belongs_beside_args() -> None:
    with pytest.raises(UserError, match=r"args\.path is 'w'; remove it, path belongs next to args"):
        bind("r", parameters_of("r", located), None, {"path": "w"}, CPU, None)


unsigned = functools.partial(iter)


def test_what_tells_no_signature_is_refused() -> None:
    name = f"{__name__}:unsigned"
    with pytest.raises(UserError, match=f"parameters of reward '{name}' cannot be inspected: wrap it"):
        build_reward(name, RewardConfig(), CPU)


@pytest.mark.parametrize(
    ("name", "path", "args", "words"),
    [
        ("emoji_clip", None, {"procesor": "x"}, "'emoji_clip' has no argument 'procesor' .*did you mean 'processor'"),
        ("pickscore", None, {"revision": 7}, "'pickscore': args.revision is 7; it must be a string or null"),
        ("clip_score", None, {"dropout": True}, "'clip_score': args.dropout is True; it must be a number"),
        ("clip_score", None, {"dropout": 1}, "'clip_score': args.dropout is 1; it must be at least 0 and less than 1"),
        ("jpeg_compressibility", "x", {}, "'jpeg_compressibility' takes no path, but path is 'x'"),
        ("jpeg_incompressibility", None, {"quality": "high"}, "args.quality is 'high'; it must be a number"),
        ("jpeg_compressibility", None, {"quality": 0}, "args.quality is 0; it must be a number from 1 to 100"),
        ("dissimilarity", None, {"same_promt": True}, "did you mean 'same_prompt'"),
        ("dissimilarity", None, {"same_prompt": "yes"}, "args.same_prompt is 'yes'; it must be true or false"),
        ("dissimilarity", None, {"dropout": 0.1}, "has no argument 'dropout' .*same_prompt, processor, revision"),
    ],
)
def test_built_in_rewards_say_what_they_take(name: str, path: str | None, args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_reward(name, RewardConfig(path=path, args=args), CPU)
