"""The command line explains itself, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from draftplus import cli
from draftplus.config import all_keys, facts_of, recipe_names
from tests.support.processes import ROOT

COMMANDS = ["train", "plan", "generate", "evaluate", "sweep", "report", "export"]


def test_all_commands_are_tested_here() -> None:
    assert [command.callback.__name__ for command in cli.app.registered_commands if command.callback] == COMMANDS


@pytest.mark.parametrize("command", [[], *([one] for one in COMMANDS), ["data"], ["data", "pack"], ["data", "show"]])
def test_help_has_an_example(draftplus: Callable[..., Any], command: list[str]) -> None:
    printed = draftplus(*command, "--help")
    assert (printed.code, printed.err) == (0, "")
    assert "Example" in printed.out
    assert f"  draftplus {' '.join(command)}" in printed.out


def test_nothing_asked_is_help(draftplus: Callable[..., Any]) -> None:
    printed = draftplus()
    assert printed.code == 0
    assert all(command in printed.out for command in COMMANDS)


def test_training_lists_every_key_and_recipe(draftplus: Callable[..., Any]) -> None:
    lines = draftplus("train", "--help").out.splitlines()
    for key, field in all_keys():
        line = next((line for line in lines if line.strip().startswith(f"{key}=")), None)
        assert line is not None, key
        assert facts_of(field).meaning in line, key
    assert any(line.strip().startswith("Recipes:") and all(name in line for name in recipe_names()) for line in lines)


def test_the_version(draftplus: Callable[..., Any]) -> None:
    from draftplus import __version__

    assert draftplus("--version").out == f"draftplus {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["evaluate", "--help"],
        ["sweep", "--help"],
        ["data", "--help"],
        ["data", "pack", "--help"],
        ["--version"],
    ],
)
def test_torch_is_not_imported(arguments: list[str]) -> None:
    code = f"""
import sys
from draftplus import cli
sys.argv = ["draftplus", *{arguments!r}]
try:
    cli.main()
except SystemExit:
    pass
heavy = {{"torch", "diffusers", "transformers", "numpy", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}
    )
