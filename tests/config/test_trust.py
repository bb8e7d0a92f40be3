"""Code that a file names, and its user neither typed nor trusted, is not imported by any command."""

from __future__ import annotations

import itertools
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import draftplus
from draftplus.config import load_config, load_run_config, remember, trusting
from draftplus.errors import UserError
from draftplus.rewards.custom import resolve_custom
from draftplus.runs.directory import write_config
from draftplus.runs.plan import plan_run
from draftplus.runs.weights import find_weights
from draftplus.sweeps.plan import plan_sweep

numbers = itertools.count()


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's state directory; the working directory is an empty one, and imports are forgotten."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return tmp_path / "state"


@pytest.fixture
def theirs() -> str:
    """A module that leaves a mark when it is imported, and imports another."""
    name = f"theirs_{next(numbers)}"
    Path(f"{name}.py").write_text(
        f"from pathlib import Path\nimport {name}_helper\nPath('imported').touch()\n"
        "def score(images, prompts, gain=1.0):\n    return gain * images.mean((1, 2, 3))\n"
    )
    Path(f"{name}_helper.py").write_text("VALUE = 1\n")
    return name


def recipe(text: str, name: str = "theirs.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run_of(text: str) -> Path:
    """A run directory as somebody else made it."""
    run = Path("runs/theirs")
    (run / "adapter").mkdir(parents=True)
    recipe(f"{text}\nlog: {{to: []}}", "runs/theirs/config.yaml")
    return run


def is_refused(command: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as error:
        command()
    assert len(str(error.value).splitlines()) <= 2
    for word in (*words, "--trust"):
        assert word in str(error.value)
    assert not Path("imported").exists()


def test_no_command_imports_what_a_recipe_names(theirs: str) -> None:
    path = recipe(f"reward: {theirs}:score")
    for command in (draftplus.train, draftplus.api.describe, lambda path: plan_sweep(path, {"seed": ["0", "1"]})):
        is_refused(lambda command=command: command(path), "theirs.yaml: reward names", f"{theirs}:score")
    child = recipe("extends: theirs.yaml", "child.yaml")
    is_refused(lambda: draftplus.train(child), "theirs.yaml: reward")
    held_out = recipe(f"eval: {{rewards: {{'{theirs}:score': {{}}}}}}", "held-out.yaml")
    is_refused(lambda: draftplus.train(held_out), "held-out.yaml: eval.rewards")


def test_nor_what_a_run_names(theirs: str) -> None:
    run = run_of(f"reward: {theirs}:score")
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    for command in (
        lambda: draftplus.train(run),
        lambda: draftplus.evaluate(str(run)),
        lambda: draftplus.api.write_images("out", str(run), ["a cat"], rewards=[f"{theirs}:score"]),
    ):
        is_refused(command, "config.yaml: reward")
    with pytest.raises(UserError, match="was started with reward"):  # compared, and not imported
        draftplus.train("emoji", ["output_dir=runs", "name=theirs"])
    assert find_weights(str(run), code=()).adapter == run / "adapter"  # as `generate` does, which imports nothing
    assert not Path("imported").exists()


def test_nor_what_a_sweep_file_names(theirs: str) -> None:
    for text in (f"grid: {{reward: ['{theirs}:score']}}", f"runs: [{{reward: '{theirs}:score'}}, {{seed: 1}}]"):
        file = recipe(f"recipe: emoji\n{text}", "sweep.yaml")
        is_refused(lambda file=file: plan_sweep(file, {}), "sweep.yaml: reward")
        with trusting(True):
            assert plan_sweep(file, {}).runs
        Path("imported").unlink()
        (Path(f"{theirs}.py")).write_text(Path(f"{theirs}.py").read_text() + "\n")  # other code: asks anew
        sys.modules.pop(theirs)


def test_a_name_that_is_put_together(theirs: str) -> None:
    """References resolve after the file is read, so the file is at fault wherever the name is not found in it."""
    path = recipe("eval: {rewards: '${oc.decode:${oc.env:THEIRS}}'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THEIRS", f"{{'{theirs}:score': {{}}}}")
        with pytest.raises(UserError):
            draftplus.train(path)
    assert not Path("imported").exists()


def test_what_the_user_types_runs(theirs: str) -> None:
    path = recipe(f"reward: {theirs}:score")
    assert load_config(None, [f"reward={theirs}:score"]).reward
    assert load_config("demo", [f"reward.{theirs}:score.args.gain=2"]).reward
    assert load_config(path, [f"reward={theirs}:score"]).reward
    is_refused(lambda: load_config(path, [f"reward.{theirs}:score.weight=2", "seed=1"]) and draftplus.train(path))


def test_but_with_the_file_s_arguments_it_is_the_file_s(theirs: str) -> None:
    path = recipe(f"reward: {{'{theirs}:score': {{args: {{gain: 3}}}}}}")
    is_refused(lambda: load_config(path, [f"reward.{theirs}:score.weight=2"]))


def test_trust_is_remembered_for_this_code_in_this_place(theirs: str, state: Path) -> None:
    path = recipe(f"reward: {theirs}:score")
    with trusting(True):
        load_config(path)
    load_config(path)
    resolve_custom(f"{theirs}:score")
    Path("imported").unlink()
    (file,) = (state / "draftplus" / "trusted").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["file"] == str(path.resolve())
    is_refused(lambda: load_config(recipe(path.read_text(), "copy.yaml")))


@pytest.mark.parametrize("what", ["module", "helper", "shadow", "extension", "arguments", "name"])
def test_other_code_in_its_place_inherits_no_trust(theirs: str, what: str) -> None:
    path = recipe(f"reward: {theirs}:score")
    with trusting(True):
        load_config(path)
    resolve_custom(f"{theirs}:score")  # its bytecode is cached now
    Path("imported").unlink()
    module = Path(f"{theirs}.py")
    if what == "module":
        module.write_text(module.read_text().replace("gain *", "2.0 *"))
    elif what == "helper":
        Path(f"{theirs}_helper.py").write_text("VALUE = 2\n")
    elif what == "shadow":
        Path("pathlib.py").write_text("")  # what the module imports would come from here
    elif what == "extension":
        Path(f"{theirs}.abi3.so").write_bytes(b"")  # is taken before the source
    elif what == "arguments":
        recipe(f"reward: {{'{theirs}:score': {{args: {{gain: 3}}}}}}")
    else:
        recipe(f"reward: {theirs}:other")
    is_refused(lambda: load_config(path))


def test_planted_bytecode_is_not_believed(theirs: str) -> None:
    """A cached file is taken where size and time of the source fit, whatever it holds."""
    import os
    import py_compile

    path, module = recipe(f"reward: {theirs}:score"), Path(f"{theirs}.py")
    with trusting(True):
        load_config(path)
    honest, times = module.read_text(), module.stat()
    module.write_text(honest.replace("gain *", "9.9 *"))
    os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))
    py_compile.compile(str(module))
    module.write_text(honest)
    os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))
    import torch

    load_config(path)
    assert resolve_custom(f"{theirs}:score")(torch.ones(1, 3, 2, 2), ["a"]).item() == 1


def test_nobody_is_asked_about_a_run_of_their_own(theirs: str) -> None:
    config = load_config(None, [f"reward={theirs}:score", "name=own", "model.path=emoji"])
    run = Path("runs/own")
    run.mkdir(parents=True)
    write_config(run, config)  # as training does once it can start
    again, where = plan_run(run, [])
    assert where == run and list(again.reward) == [f"{theirs}:score"]
    (run / "adapter").mkdir()
    assert find_weights(str(run)).adapter == run / "adapter"


def test_nor_about_one_that_was_moved_or_given_other_arguments(theirs: str) -> None:
    run, moved = Path("runs/own"), Path("archive/mine")
    run.mkdir(parents=True)
    reward = f"reward={{'{theirs}:score': {{args: {{gain: 2}}}}}}"
    write_config(run, load_config(None, [reward, "name=own"]))
    typed = f"reward.{theirs}:score.args.gain=3"
    assert load_run_config(run, [typed]).reward[f"{theirs}:score"].args == {"gain": 3}
    moved.parent.mkdir()
    run.rename(moved)
    for overrides in ((), (typed,), (f"reward.{theirs}:score.weight=2",)):
        assert load_run_config(moved, overrides).reward
    config = (moved / "config.yaml").read_text()
    recipe(config.replace("gain: 2", "gain: 4"), "archive/mine/config.yaml")
    is_refused(lambda: load_run_config(moved), "archive/mine/config.yaml: reward")
    is_refused(lambda: load_run_config(moved, [f"reward.{theirs}:score.weight=2"]), "archive/mine/config.yaml: reward")
    recipe(config, "archive/mine/config.yaml")
    Path(f"{theirs}_helper.py").write_text("VALUE = 2\n")
    is_refused(lambda: load_run_config(moved), "has changed since you trusted it or trained with it", "Restore it")
    is_refused(lambda: load_run_config(moved, [f"reward.{theirs}:score.weight=2"]), "has changed")


def test_a_home_that_cannot_be_written_is_said(theirs: str, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state.write_text("not a directory")
    remember(Path("runs/own/config.yaml"), load_config(None, [f"reward={theirs}:score"]))
    assert "cannot be remembered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:system", "os is a module of Python itself"),
        ("builtins:eval", "builtins is a module of Python itself"),
        ("posix:system", "module of Python itself"),
        ("subprocess:run", "subprocess is a module of Python itself"),
        ("torch.serialization:os.system", "a function of Python or of a C library"),
        ("torch:tensor", "a function of Python or of a C library"),
        ("torch.serialization:shutil.rmtree", "a function of Python or of a C library"),
    ],
)
def test_python_s_own_functions_are_no_rewards(name: str, words: str) -> None:
    """However they are reached, and whoever says so."""
    with pytest.raises(UserError, match=words):
        draftplus.load_reward(name, device="cpu")
    if "Python itself" in words:
        with trusting(True), pytest.raises(UserError, match=f"theirs.yaml: .*{words}"):
            load_config(recipe(f"reward: {name}"))


def test_the_working_directory_takes_no_library_s_place(theirs: str) -> None:
    """Once the reward is imported, what libraries import late is theirs."""
    here = str(Path.cwd())
    resolve_custom(f"{theirs}:score")
    assert sys.path[0] != here and sys.path[-1] == here
