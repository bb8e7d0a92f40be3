"""What the schema says of its keys holds for every key, and the lists that follow are those that were agreed on."""

from __future__ import annotations

import ast
import typing
from pathlib import Path

import pytest

from draftplus.config import (
    BASE_MODEL,
    CHANGEABLE,
    all_keys,
    base_model_of,
    facts_of,
    flatten,
    is_below,
    keys_that_affect,
    keys_where,
    load_config,
    to_dict,
)
from draftplus.config.facts import Affects, Facts
from draftplus.config.facts import key as make_field
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.regularisers import SPACES
from draftplus.errors import UserError

KEYS = {key: facts_of(field) for key, field in all_keys()}
CHOOSING = [key for key, facts in KEYS.items() if facts.choices]
LISTS = [key for key, facts in KEYS.items() if facts.each]
FLOATS = [key for key, field in all_keys() if "float" in str(field.type)]


def beyond(facts: Facts) -> list[float]:
    """Whole numbers just outside the bounds; a bound that a value must not reach is outside itself."""
    limits = [(facts.above, 0), (facts.at_least, -1), (facts.below, 0), (facts.at_most, 1)]
    return [limit + step for limit, step in limits if limit is not None]


def written(facts: Facts, value: object) -> str:
    return f"[{', '.join([str(value)] * (facts.count or 1))}]" if facts.each else str(value)


def refused(override: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, facts in KEYS.items() for value in beyond(facts)])
def test_a_value_beyond_its_bound_is_refused_by_name(key: str, value: float) -> None:
    message = refused(f"{key}={written(KEYS[key], value)}")
    assert message.startswith(f"{key} is ") and " must " in message
    for limit in (KEYS[key].above, KEYS[key].at_least, KEYS[key].at_most, KEYS[key].below):
        assert limit is None or f" {limit:g}" in message.partition(" must ")[2]


@pytest.mark.parametrize("key", [key for key, facts in KEYS.items() if None not in (facts.at_least, facts.at_most)])
def test_bounds_that_may_be_reached(key: str) -> None:
    for value in (KEYS[key].at_least, KEYS[key].at_most):
        load_config(None, [f"{key}={written(KEYS[key], value)}"])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", FLOATS)
def test_no_number_is_without_end(key: str, value: str) -> None:
    assert refused(f"{key}={written(KEYS[key], value)}").startswith(f"{key} is ")


def test_an_integer_beyond_all_floats_is_one() -> None:
    assert load_config(None, [f"seed={10**400}"]).seed == 10**400


@pytest.mark.parametrize("where", ["reward.emoji_clip", "reward.other", "eval.rewards.other"])
def test_a_rewards_weight_is_finite(where: str) -> None:
    assert refused(f"{where}.weight=.nan") == f"{where}.weight is nan; it must be finite"


@pytest.mark.parametrize("key", CHOOSING)
def test_what_is_no_choice_is_refused_by_name(key: str) -> None:
    message = refused(f"{key}={written(KEYS[key], 'no such choice')}")
    assert message.startswith(key) and "'no such choice'" in message
    assert message.endswith(f"; choose one of: {', '.join(KEYS[key].choices)}")


@pytest.mark.parametrize("key", LISTS)
def test_a_list_of_another_length(key: str) -> None:
    if key == "sampler.sigmas":  # of no steps at all
        assert "sampler.sigmas is empty" in refused(f"{key}=[]")
    elif KEYS[key].count is None:
        load_config(None, [f"{key}=[]"])
    else:
        assert f"must have {KEYS[key].count} entries" in refused(f"{key}=[]")


@pytest.mark.parametrize("key", CHOOSING)
def test_help_begins_with_the_choices(key: str) -> None:
    assert KEYS[key].meaning.startswith(" | ".join(KEYS[key].choices))
    spelled_out = [choice for choice in KEYS[key].choices if f"{choice} |" in KEYS[key].help]
    assert not spelled_out, "the choices are said already"


def test_what_a_continued_run_may_change() -> None:
    assert CHANGEABLE == (
        "name", "output_dir", "device", "model.gradient_checkpointing", "model.vae_slicing", "model.offload",
        "train.steps", "train.epochs", "train.micro_batch_size", "train.sampling_batch_size", "train.compile", "eval",
        "checkpoint", "stop", "parallel", "log",
    )  # fmt: skip


def test_what_makes_no_other_setting() -> None:
    """The report groups runs by all other keys; a sweep names its runs by all that are no record where it can."""
    assert set(CHANGEABLE) - set(keys_that_affect("conduct", "record")) == {"train.steps", "train.epochs"}
    assert keys_that_affect("record") == ("eval", "checkpoint", "log")


def test_every_key_affects_one_thing() -> None:
    kinds: tuple[Affects, ...] = typing.get_args(Affects)
    for key in KEYS:
        assert sum(is_below(key, keys_that_affect(kind)) for kind in kinds) == 1, key


def test_which_model_is_tuned() -> None:
    # the values stand in eval.json in this order, those of later versions at the end and only where they are set
    first = ("model.path", "model.revision", "model.denoiser", "model.vae", "model.dtype")
    assert (*first, "model.variant", "model.config", "model.quantize", "model.vae_tiling") == BASE_MODEL
    flat = flatten(to_dict(load_config(None, ["model.path=x"])))
    assert base_model_of(flat) == ["x", None, None, None, "float32"]
    assert base_model_of({**flat, "model.variant": "fp16"}) == ["x", None, None, None, "float32", "fp16"]
    assert base_model_of({**flat, "model.vae_tiling": True}) == ["x", None, None, None, "float32", True]


def test_a_methods_name_tells_some_keys() -> None:
    names = ("method", "grad_steps", "kl_coeff", "kl_space", "kl_steps", "kl_weights", "kl_prefix_coeff", "gate")
    told = tuple(f"objective.{name}" for name in names)
    assert keys_where(lambda facts: facts.in_method_name) == told


def test_is_below() -> None:
    assert is_below("eval.every", ["eval"]) and is_below("eval", ["eval"]) and is_below("a.b.c", ["x", "a.b"])
    assert not is_below("evaluation", ["eval"]) and not is_below("eval", ["eval.every"]) and not is_below("a", [])


def test_the_help_lists_every_method() -> None:
    assert KEYS["objective.method"].meaning.split(" | ") == list(METHODS)


def test_the_spaces_of_the_kl_term_are_those_that_it_knows() -> None:
    assert KEYS["objective.kl_space"].choices == tuple(SPACES)


def test_a_mistyped_fact_is_refused() -> None:
    with pytest.raises(TypeError, match="abov"):
        make_field(1, "help", abov=0)  # type: ignore[call-arg]


def test_no_key_is_named_again_in_a_list() -> None:
    """A tuple of three dotted keys or more, in the source, is a list that should follow from the schema."""
    found = []
    for path in (Path(__file__).parents[2] / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                texts = [one.value for one in node.elts if isinstance(one, ast.Constant)]
                if sum(text in KEYS and "." in str(text) for text in texts) >= 3:
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
