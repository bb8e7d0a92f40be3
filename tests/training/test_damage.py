"""What is damaged on the disk is named, with the way on; nothing is trained from it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from draftplus.errors import UserError
from draftplus.training import checkpoint
from draftplus.training.state import initial_state
from tests.support.runs import rows
from tests.training.test_drive import Fit, configured, fit

FILES = ["weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "SHA256SUMS"]
TOTAL = 10
CONFIG = configured(Path())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and six of its ten steps, with checkpoints at 4 and 6."""
    directory = tmp_path_factory.mktemp("made")
    fit(directory / "whole", TOTAL)
    with pytest.raises(ZeroDivisionError):
        fit(directory / "run", TOTAL, 6)
    return directory


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def restore(run: Path) -> None:
    state = initial_state(Fit(CONFIG, run, TOTAL).parameters, CONFIG.optim)
    assert checkpoint.restore(run / "checkpoints", state) and state.step == 6


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def assert_it_ends_like_the_whole(run: Path) -> None:
    fit(run, TOTAL)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(run / name) == rows(run.parent / "whole" / name)
    assert (run / "adapter" / "w.json").read_text() == (run.parent / "whole" / "adapter" / "w.json").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed(run: Path, name: str) -> None:
    """Wherever it is; and what the message says to do leads to the undamaged result."""
    newest = run / "checkpoints" / "step-000006"
    whole = (newest / name).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 15):
        flip(newest / name, bit)
        with pytest.raises(UserError) as told:
            restore(run)
        assert str(told.value).startswith(f"{newest}: damaged (")
        assert f"remove {newest} to continue from step 4, whose checkpoint is whole" in str(told.value)
        assert len(str(told.value).splitlines()) == 1
        (newest / name).write_bytes(whole)
    restore(run)
    shutil.rmtree(newest)
    assert_it_ends_like_the_whole(run)


def test_a_state_of_another_step(run: Path) -> None:
    """Its own step is compared too, where a checkpoint of an earlier version has no checksums."""
    older, newest = (run / "checkpoints" / f"step-00000{step}" for step in (4, 6))
    shutil.copy(older / "state.json", newest)
    with pytest.raises(UserError, match=r"state\.json does not match"):
        fit(run, TOTAL)
    (newest / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"state\.json is of step 4"):
        fit(run, TOTAL)


def test_a_list_of_checksums_that_was_cut(run: Path) -> None:
    (run / "checkpoints" / "step-000006" / "SHA256SUMS").write_text("")
    with pytest.raises(UserError, match="damaged"):
        restore(run)


def test_no_checkpoint_is_whole(run: Path) -> None:
    for step in (4, 6):
        flip(run / "checkpoints" / f"step-00000{step}" / "weights.safetensors", 900)
    with pytest.raises(UserError, match=r"step-000006: damaged.*no other checkpoint is whole"):
        fit(run, TOTAL)


def test_a_checkpoint_of_an_earlier_version(run: Path) -> None:
    for sums in (run / "checkpoints").glob("*/SHA256SUMS"):
        sums.unlink()
    assert_it_ends_like_the_whole(run)


@pytest.mark.parametrize("name", [name for name in FILES if name != "SHA256SUMS"])
def test_without_checksums_no_damage_is_a_traceback(run: Path, name: str) -> None:
    """What can be told is told in a line; the rest is why there are checksums."""
    newest = run / "checkpoints" / "step-000006"
    (newest / "SHA256SUMS").unlink()
    whole = (newest / name).read_bytes()
    told = 0
    for bit in random.Random(1).sample(range(8 * min(len(whole), 400)), 30):
        flip(newest / name, bit)
        try:
            restore(run)
        except UserError:
            told += 1
        (newest / name).write_bytes(whole)
    assert told > 5


BROKEN = {
    "null": b"null\n",
    "a list": b"[1]\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is none": b'{"step": "4"}\n',
    "a step that is a truth": b'{"step": true}\n',
    "not UTF-8": b'{"step": 4, "\xff": 1}\n',
    "not JSON": b'{"step": 4,\n',
}


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_damaged_row_is_named(run: Path, name: str, what: str, where: str) -> None:
    path, row = run / name, BROKEN[what]
    whole = path.read_bytes()
    path.write_bytes(row + whole if where == "first" else whole + row)
    number = 1 if where == "first" else whole.count(b"\n") + 1
    with pytest.raises(UserError, match=rf"{name}: line {number} .*remove that line"):
        fit(run, TOTAL)


def test_a_value_that_no_run_writes(run: Path) -> None:
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "lpips_per_prompt": {"a cat": "x"}}) + "\n")
    with pytest.raises(UserError, match=r"eval\.jsonl: line 3 has a lpips_per_prompt that no run writes"):
        fit(run, TOTAL)


def test_fewer_steps_than_are_done(run: Path) -> None:
    with pytest.raises(UserError, match=r"has done 6 steps already, more than the 5 .*train\.steps=6 or more"):
        fit(run, 5)
    assert_it_ends_like_the_whole(run)
