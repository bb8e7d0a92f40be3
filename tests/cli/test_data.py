"""`draftplus data pack` and `data show`, and a run on what was packed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftplus.data.prompts import load_prompts
from tests.support.processes import ROOT
from tests.support.runs import ANIMALS, rows, train_here, weights

Command = Callable[..., Any]
Refused = Callable[..., None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "many.csv"
    path.write_text("id,title\n" + "".join(f"1,a {animal} with a hat\n" for animal in [*ANIMALS, "CAT", "x" * 99]))
    return path


def test_packing_tells_what_it_did(draftplus: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = draftplus(
        "data", "pack", source, "--column", "title", "-o", out, "--max-characters", 50, "--held-out", 2, "--seed", 3
    )
    assert printed.code == 0 and printed.out == (
        f"read:     22 prompts\nkept:     18 to train on, 2 held out\npacked:   {out}\n"
    )
    told = printed.err.splitlines()
    assert told == [
        "dropped 1 repeated but for case, punctuation or white space, such as a CAT with a hat",
        f"dropped 1 too long, such as line 23: a {'x' * 99} with a hat",
    ]
    shown = draftplus("data", "show", out, "--examples", 1)
    assert "prompts      20, 20 distinct" in shown.out and "training     18 to train on, 2 held out" in shown.out
    assert "with an index" in shown.out and shown.out.splitlines()[-1].startswith("  a ")
    assert json.loads(draftplus("data", "show", out, "--json").out)["held_out"] == 2
    assert draftplus("data", "show", "animals").code == 0
    assert "columns      id, title" in draftplus("data", "show", source, "--column", "title").out


def test_bad_input(refused: Refused, draftplus: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(["data", "pack", source, "--column", "titel", "-o", out], "'titel'", r"did you mean 'title'\?")
    refused(["data", "pack", source, "-o", out], "title", "--column")
    refused(["data", "pack", tmp_path / "no.txt", "-o", out], "no prompt file '.*no.txt'")
    refused(["data", "pack", source, "--column", "title", "-o", out / "{0..10}.tar"], "equally long numbers")
    refused(["data", "pack", source, "--column", "title", "-o", source], "is not a directory")
    refused(["data", "pack", source, "-o", out, "--near", "2"], "--near is 2")
    refused(["data", "pack", source], "output")
    refused(["data", "show", tmp_path / "no.txt"], "no prompt file")
    assert not out.exists()


def test_a_disk_that_is_full_or_not_ours(
    draftplus: Command, refused: Refused, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["data", "pack", source, "--column", "title", "-o", tmp_path / "out"]

    def fails(number: int) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            raise OSError(number, os.strerror(number), "out/00000.tar")

        return fail

    monkeypatch.setattr("draftplus.data.shards._write", fails(errno.ENOSPC))
    printed = draftplus(*arguments)
    assert printed.code == 1 and printed.err == "draftplus: out/00000.tar: No space left on device\n"
    monkeypatch.setattr("draftplus.data.shards._write", fails(errno.EACCES))
    refused(arguments, "Permission denied; ask its owner")
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def test_a_run_on_packed_prompts_is_the_run_on_their_text(
    draftplus: Command, settings: list[str], tmp_path: Path
) -> None:
    """Bit for bit; and it goes on with the one where it began with the other."""
    assert draftplus("data", "pack", tmp_path / "prompts.txt", "-o", tmp_path / "out", "--held-out", 3).code == 0
    prompts = load_prompts(tmp_path / "out")
    packed = train_here(settings, f"data.prompts={tmp_path / 'out'}", "name=packed")
    (tmp_path / "all.jsonl").write_text(
        "".join(
            json.dumps({"prompt": one, "split": split}) + "\n"
            for split, some in (("train", prompts.train), ("held_out", prompts.held_out))
            for one in some
        )
    )
    plain = train_here(settings, f"data.prompts={tmp_path / 'all.jsonl'}", "name=plain")
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert rows(packed / name) == rows(plain / name)
    tensors, others = weights(packed / "adapter"), weights(plain / "adapter")
    assert tensors.keys() == others.keys() and all(tensors[key].equal(others[key]) for key in tensors)
    train_here(settings, f"data.prompts={tmp_path / 'out'}", "name=plain", "train.steps=5")
    assert [row["step"] for row in rows(plain / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_packing_needs_no_torch(source: Path, tmp_path: Path) -> None:
    arguments = ["data", "pack", str(source), "--column", "title", "--near", "0.9", "-o", str(tmp_path / "out")]
    code = f"""
import sys
from draftplus import cli
sys.argv = ["draftplus", *{arguments!r}]
cli.main()
heavy = {{"torch", "diffusers", "transformers", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
