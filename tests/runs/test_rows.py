"""The rows of eval.jsonl and the targets of eval.json: what is written is what is read, in the order of the files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from draftplus.runs.rows import (
    HeldOut,
    MetricRow,
    TargetRow,
    evaluation_row,
    ill_formed,
    read_evaluation,
    read_held_out,
    read_target,
    variant_row,
)

HELD_OUT = HeldOut(
    reward=1.5, rewards={"a": 2.0, "m:b": None}, lpips=0.3, images=4, seconds=1.25,
    per_image={"a": [1.0, 3.0, 2.0, 2.0], "m:b": [None, 0.0, 0.0, 1.0]}, lpips_per_prompt={"an owl": 0.2, "a cat": 0.4},
)  # fmt: skip


def test_a_row_of_an_evaluation() -> None:
    variant = variant_row("lora_scale=0.5", {"lora_scale": 0.5}, HELD_OUT)
    row = {**evaluation_row(20, HELD_OUT), "variants": [variant]}
    measured = ["reward", "reward/a", "reward/m:b", "lpips", "images", "seconds", "per_image", "lpips_per_prompt"]
    assert list(row) == ["step", *measured, "variants"] and list(variant) == ["label", "lora_scale", *measured]
    assert ill_formed(json.loads(json.dumps(row))) == []
    told = read_evaluation(json.loads(json.dumps(row)))
    assert (told.step, told.held_out) == (20, HELD_OUT)
    (one,) = told.variants
    assert (one.label, one.lora_scale, one.anneal, one.checkpoint) == ("lora_scale=0.5", 0.5, None, None)
    assert one.held_out == HELD_OUT


def test_scores_are_told_apart_by_prompt() -> None:
    assert HELD_OUT.prompts == ["an owl", "a cat"]
    assert HELD_OUT.scores("a") == [[1.0, 3.0], [2.0, 2.0]]
    assert HELD_OUT.scores("c") is None
    assert HeldOut(per_image={"a": [1.0, 2.0, 3.0]}, lpips_per_prompt={"x": 0.1, "y": 0.2}).scores("a") is None


def test_what_a_row_lacks_is_not_there() -> None:
    told = read_evaluation({"step": 0})
    assert told.held_out == HeldOut() and told.held_out.rewards == {} and told.variants == ()
    assert read_held_out({"step": 0, "reward/a": None}).rewards == {"a": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lpips", "many"),
        ("lpips", True),
        ("reward/a", []),
        ("per_image", [1]),
        ("per_image", {"a": 1}),
        ("per_image", {"a": ["x"]}),
        ("lpips_per_prompt", {"an owl": "far"}),
        ("variants", 3),
        ("variants", [{"label": "x", "lpips": "many"}]),
        ("variants", [{"label": 3}]),
    ],
)
def test_what_is_ill_formed_is_named(key: str, value: Any) -> None:
    assert ill_formed({**evaluation_row(0, HELD_OUT), key: value}) == [key]


def target(**changes: Any) -> dict[str, Any]:
    change = MetricRow(0.5, 0.1, (0.3, 0.7), 4)
    return {**TargetRow("runs/a", "a", metrics={"lpips": MetricRow(1.0, 0.2, (0.8, 1.2), 4, change)}).row(), **changes}


def test_a_target() -> None:
    row = target()
    assert list(row) == [
        "target", "label", "run", "step", "lora_scale", "anneal", "gate", "hash", "model_hash", "adapter_hash",
        "metrics", "per_prompt", "per_image", "pictures",
    ]  # fmt: skip
    assert row["metrics"]["lpips"] == {
        "mean": 1.0, "standard_error": 0.2, "interval": [0.8, 1.2], "images": 4,
        "change": {"mean": 0.5, "standard_error": 0.1, "interval": [0.3, 0.7], "images": 4},
    }  # fmt: skip
    assert read_target(json.loads(json.dumps(row))).row() == row
    assert read_target({"target": "a", "metrics": {"vendi": {"mean": None}}}).metrics["vendi"].mean is None


@pytest.mark.parametrize(
    "told",
    [
        3,
        {"label": "a", "metrics": {}},
        target(metrics=[1]),
        target(label=3),
        target(metrics={"lpips": {}}),
        target(metrics={"lpips": {"mean": "1"}}),
        target(metrics={"lpips": {"mean": 1.0, "interval": [1.0]}}),
        target(metrics={"lpips": {"mean": 1.0, "images": "<img>"}}),
    ],
)
def test_what_is_no_target(told: Any) -> None:
    with pytest.raises(ValueError, match=r"^(a|an) (target|metric|interval)"):
        read_target(told)
