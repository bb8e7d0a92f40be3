"""A grid is split, multiplied and named as it is written, and a mistake in it is said before anything runs."""

import itertools
import json
import math
import re

import pytest

from draftplus.errors import UserError
from draftplus.sweeps.grid import (
    MOST_RUNS,
    arguments,
    expand,
    names,
    parse_grid,
    split_values,
    with_variants,
    written,
    written_grid,
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,10", ["0", "1", "10"]),
        ("[0.9,0.99]", ["[0.9,0.99]"]),
        ("[0.9,0.99],[0.8,0.9]", ["[0.9,0.99]", "[0.8,0.9]"]),
        ("{rank:4,alpha:4},{rank:8,alpha:8},null", ["{rank:4,alpha:4}", "{rank:8,alpha:8}", "null"]),
        ("'a, b',\"c,d\"", ["'a, b'", '"c,d"']),
        ("[{a: [1,2]}, 3], x", ["[{a: [1,2]}, 3]", "x"]),
        ("'[',1", ["'['", "1"]),
        ('""', ['""']),
    ],
)
def test_values_are_split_at_commas_of_their_own(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["[1,2", "1,2]", "{a:1", "'a", "[1}", "1,,2", "1,", ",1"])
def test_what_does_not_close_or_is_empty_is_refused(text):
    with pytest.raises(UserError, match=re.escape(text)):
        split_values(text)
    with pytest.raises(UserError, match=r"optim\.lr: "):
        parse_grid([f"optim.lr={text}"])


def test_every_combination_once_and_small_grids_of_their_own():
    grid = parse_grid(["objective.kl_coeff=0,1", "seed=0,1,2", "train.steps=4"])
    runs = expand(grid)
    assert [tuple(run.values()) for run in runs] == list(itertools.product(["0", "1"], ["0", "1", "2"], ["4"]))
    mixed = expand({"seed": ["0", "1"]}, [{"objective.grad_steps": ["1", "2"]}, {"objective.method": ["draft_lv"]}])
    assert len(mixed) == 2 * 3 and all("seed" in run for run in mixed)
    assert expand({}, [{"seed": ["0"]}]) == [{"seed": "0"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["seed=0,1", "seed=2"], r"seed is given twice \(0,1 and 2\)"),
        (["seed"], "KEY=V1,V2"),
        (["seed="], "KEY=V1,V2"),
        (["=1"], "KEY=V1,V2"),
        ([], "the grid is empty"),
        (["name=a,b"], r"name=a,b: a sweep cannot range over name"),
        (["output_dir=a"], "cannot range over output_dir"),
        (["seed=0,0"], "seed=0 is in the sweep twice"),
        ([f"seed={','.join(map(str, range(1001)))}"], r"1,001 runs .*at most 1,000"),
        ([f"{key}={','.join(map(str, range(100)))}" for key in "abcde"], "10,000,000,000 runs"),
    ],
)
def test_grids_that_make_no_sweep(given, said):
    with pytest.raises(UserError, match=said):
        expand(parse_grid(given))


def test_the_largest_sweep_is_allowed():
    assert len(expand({"seed": [str(i) for i in range(MOST_RUNS)]})) == MOST_RUNS


def test_a_key_in_the_grid_and_in_a_run_is_refused():
    with pytest.raises(UserError, match=r"seed is in the grid \(0\) and in a run \(1\)"):
        expand({"seed": ["0"]}, [{"seed": ["1"]}])


def test_names_tell_runs_apart_and_stay_when_values_are_added():
    few = expand(parse_grid(["objective.kl_coeff=0,0.1", "seed=0,1", "train.steps=4"]))
    many = expand(parse_grid(["objective.kl_coeff=0,0.1,-1,1", "seed=0,1,2", "train.steps=4"]))
    assert names(few)[:2] == ["kl_coeff-0_seed-0", "kl_coeff-0_seed-1"]
    assert set(names(few)) < set(names(many)) and len(set(names(many))) == len(many)
    assert names([{"train.steps": "4"}]) == ["steps-4"]


def test_names_leave_out_how_a_run_is_watched_unless_that_is_all():
    assert names([{"seed": "0", "eval.every": "5"}, {"seed": "1", "eval.every": "10"}]) == ["seed-0", "seed-1"]
    assert names([{"eval.every": "5"}, {"eval.every": "10"}]) == ["every-5", "every-10"]
    alike = names([{"seed": "0", "eval.every": "5"}, {"seed": "0", "eval.every": "10"}, {"seed": "1"}])
    assert len(set(alike)) == 3


def test_knobs_are_ways_to_sample_each_run_and_make_no_runs():
    grid = with_variants(parse_grid(["lora_scale=0,0.5", "seed=0,1", "anneal=power:2,linear", "checkpoint=40"]))
    (text,) = grid.pop("eval.variants")
    assert grid == {"seed": ["0", "1"]}
    assert json.loads(text) == [
        {"lora_scale": 0}, {"lora_scale": 0.5}, {"anneal": "power:2"}, {"anneal": "linear"}, {"checkpoint": 40},
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"anneal and eval\.variants are both in the grid"):
        with_variants({"eval.variants": ["[{anneal: linear}]"], "anneal": ["linear"]})


def test_names_are_plain_short_and_unique():
    grid = parse_grid(["model.lora={rank:4,alpha:4},{rank:4,alpha: 4 },null", "b.weight=1,2", "c.weight=3,4", "d=1"])
    grid["data.prompts"] = ["x/y.txt", "x y.txt", "é" * 200, "z" * 300]
    told = names(expand(grid))
    assert len(set(told)) == len(told) == math.prod(map(len, grid.values()))
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,80}", name) for name in told)
    assert any("b.weight-1" in name and "c.weight-3" in name for name in told)


def test_values_of_a_file_come_back_as_they_were():
    from draftplus.config.load import _parse_override

    values = [0, 1.5, 1e-5, True, None, "draft_lv", "null", "1e-3", "power:2", "a: b", "x, y", [0.9, 0.99], {"rank": 4}]
    for value in values:
        assert _parse_override(f"k={written(value)}").tree["k"] == value
    told = written_grid({"optim.betas": [[0.9, 0.99]], "seed": range(2), "train.steps": 4}, "grid")
    assert arguments(expand(told)[1]) == ["optim.betas=[0.9, 0.99]", "seed=1", "train.steps=4"]
    with pytest.raises(UserError, match="seed has no values"):
        written_grid({"seed": []}, "grid")
