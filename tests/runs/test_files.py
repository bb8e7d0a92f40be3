"""Files follow the umask, what is removed is gone at once, and what cannot be read is not called damaged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draftplus.errors import UserError
from draftplus.runs import directory, files
from draftplus.runs.checksums import seal, unseal, verify, write_sums
from draftplus.runs.directory import forget_after, locked, saved_steps
from draftplus.runs.weights import find_weights, intact
from tests.support.processes import ROOT
from tests.training.test_drive import fit


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: Any) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_everything_follows_the_umask(tmp_path: Path, umask: int) -> None:
    run = tmp_path / "run"
    with locked(run):
        fit(run, 4)
    with files.whole_directory(run / "more") as building:
        save_file({"a": torch.zeros(1)}, building / "a.safetensors")
    for path in [run, *run.rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == expected, path


def test_a_removal_that_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loader sees half of a checkpoint, and the next start takes the rest away."""
    run = tmp_path / "run"
    fit(run, 4)
    older, newest = (run / "checkpoints" / f"step-00000{step}" for step in (2, 4))

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "weights.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        files.remove(newest)
    assert saved_steps(run / "checkpoints") == [2]
    assert len(list((run / "checkpoints").iterdir())) == 2
    fit(run, 4)
    assert sorted((run / "checkpoints").iterdir()) == [older, newest]
    verify(newest)


@pytest.mark.parametrize("late", [False, True], ids=["before its place is taken", "after"])
def test_what_made_room_comes_back(tmp_path: Path, late: bool) -> None:
    """Killed between the two renames: the former stays, unless the new one is there."""
    run = tmp_path / "run"
    (run / ".adapter.old").mkdir(parents=True)
    (run / ".adapter.building").mkdir()
    (run / ".config.yaml.building").write_text("half")
    if late:
        (run / "adapter").mkdir()
    forget_after(run, 5)
    assert [path.name for path in run.iterdir()] == ["adapter"]


def test_a_directory_that_cannot_be_listed_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(PermissionError):
        directory.saved_steps(tmp_path)


@pytest.mark.parametrize("name", ["SHA256SUMS", "weights.safetensors", "state.json"])
def test_unreadable_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = tmp_path / "run"
    fit(run, 4)
    opening = Path.open

    def denied(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=rf"step-000004/{name}: Permission denied; .*cannot be read") as told:
        fit(run, 6)
    said = str(told.value).replace(str(tmp_path), "")
    assert "damaged" not in said and "remove" not in said


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """Unlike pytest's, which only this user may enter."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


AS_ANOTHER = """
import os, sys
from pathlib import Path
from draftplus.weights import read_state_dict
from draftplus.runs.checksums import verify
os.setgroups([])  # only now: another user might not be let into the environment that this is installed in
os.setgid(65534)
os.setuid(65534)
for look, path in ((verify, sys.argv[1]), (read_state_dict, sys.argv[2])):
    try:
        look(Path(path))
    except PermissionError as error:
        print(error.filename)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, who may become another user")
def test_as_another_user(open_to_all: Path) -> None:
    """The true thing: files that only their owner may read."""
    checkpoint = open_to_all / "step-000004"
    with files.whole_directory(checkpoint, checksums=True) as building:
        save_file({"a": torch.zeros(1)}, building / "a.safetensors")
    (checkpoint / "a.safetensors").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, checkpoint, checkpoint / "a.safetensors"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": "/tmp"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(checkpoint / "a.safetensors")] * 2, done.stderr


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    for name in ("a.json", "deeper/b.safetensors"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    verify(tmp_path)
    (tmp_path / "README.md").write_text("what a user adds")
    verify(tmp_path)
    (tmp_path / "model.safetensors").write_text("what a loader would read")
    with pytest.raises(ValueError, match="model"):
        verify(tmp_path)


def test_a_seal(tmp_path: Path) -> None:
    told = {"a": [1, 2.5, None, "é"], "b": {"c": float("inf")}, "d": {1: (2, 3)}}
    text = seal(told)
    assert unseal(text) == {**told, "d": {"1": [2, 3]}}
    for damaged in (text.replace("2.5", "2.6"), text.replace('"a"', '"e"'), "[]", "{}", "", text[:-3]):
        with pytest.raises(ValueError):
            unseal(damaged)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run, 4)
    for place in ("adapter", "adapters/step-000004"):
        assert intact(run / place) == run / place
        (run / place / "w.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter: damaged \(w\.json does not match its checksum\)"):
        find_weights(str(run))
    with pytest.raises(UserError, match=r"step-000004: damaged"):
        find_weights(f"{run}@4")
    fit(run, 4)
    assert find_weights(str(run)).adapter == run / "adapter", "the same command writes it again, as the message says"


def test_an_adapter_that_the_run_has_gone_past(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Continued and not at its end yet, a run still has the adapter of its former end, which is taken and said."""
    run = tmp_path / "run"
    fit(run, 4)
    find_weights(str(run))
    assert "continued" not in capsys.readouterr().err
    shutil.copytree(run / "adapter", tmp_path / "former")
    fit(run, 8)
    find_weights(str(run))
    assert "continued" not in capsys.readouterr().err, "an end that is reached"
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "former", run / "adapter")
    assert find_weights(str(run)).adapter == run / "adapter"
    assert f"its newest weights are {run}@8" in capsys.readouterr().err
    find_weights(f"{run}@4")
    assert not capsys.readouterr().err
    (run / "adapters" / "step-000008" / "SHA256SUMS").write_bytes(b"\xff")
    assert find_weights(str(run)).adapter == run / "adapter", "those of others are nothing to it"


def test_an_adapter_among_other_files(tmp_path: Path) -> None:
    """A list of checksums beside it may be of other files, some of which are not there; its own line counts."""
    mine = tmp_path / "mine.safetensors"
    mine.write_text("a")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  theirs.safetensors\n")
    assert intact(mine) == mine
    write_sums(tmp_path)
    assert intact(mine) == mine
    mine.write_text("b")
    with pytest.raises(UserError, match=r"mine\.safetensors: damaged"):
        intact(mine)


@pytest.mark.parametrize("text", ["[]", "null", '{"step": null}', '{"step": 1e400}', '{"step": "x"}', "{", ""])
def test_an_odd_best(tmp_path: Path, text: str) -> None:
    run = tmp_path / "run"
    fit(run, 4)
    (run / "best.json").write_text(text)
    with pytest.raises(UserError, match=r"best\.json does not say .*draftplus train"):
        find_weights(f"{run}@best")
