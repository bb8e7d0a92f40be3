"""Checkpoints are whole or not there, also where the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from draftplus.errors import UserError
from draftplus.runs import files, journal
from draftplus.runs.directory import saved_steps
from draftplus.training import checkpoint
from tests.support.runs import fingerprint, train_here, weights

EMA = ["optim.ema=0.5", "checkpoint.every=2", "checkpoint.keep=5"]
FULL = "No space left on device"


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, FULL)


def full_at(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The disk is full when a checkpoint's file of this name is written, which then is half there."""

    def tensors(patch: pytest.MonkeyPatch) -> None:
        save = save_file

        def saving(state: dict[str, Any], path: Path) -> None:
            if path.name != name:
                return save(state, path)
            path.write_bytes(b"half")
            # as safetensors says it
            raise SafetensorError(f"Error while serializing: I/O error: {FULL} (os error {errno.ENOSPC})")

        patch.setattr(checkpoint, "save_file", saving)

    def text(patch: pytest.MonkeyPatch) -> None:
        write = Path.write_text

        def writing(path: Path, *args: Any, **kwargs: Any) -> int:
            if path.name != name:
                return write(path, *args, **kwargs)
            write(path, "{")
            raise OSError(errno.ENOSPC, FULL)

        patch.setattr(Path, "write_text", writing)

    return text if name.endswith(".json") else tensors


def full_at_flush(patch: pytest.MonkeyPatch) -> None:
    sync = files._sync
    patch.setattr(files, "_sync", lambda path: no_space() if path.name == "state.json" else sync(path))


PLACES = {
    **{name: full_at(name) for name in ("weights.safetensors", "optimizer.safetensors", "ema.safetensors")},
    "state.json": full_at("state.json"),
    "flush": full_at_flush,
}


@pytest.fixture(scope="module")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.runs import small_settings

    return train_here(small_settings(small, tmp_path_factory.mktemp("whole")), *EMA)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_no_space_left(settings: list[str], monkeypatch: pytest.MonkeyPatch, whole: Path, place: str) -> None:
    """A plain error; the checkpoint before stays whole and continues exactly; nothing half-written stays."""
    run = train_here(settings, *EMA, "train.steps=2")
    before = weights(run / "checkpoints" / "step-000002")
    with monkeypatch.context() as patch:
        PLACES[place](patch)
        with pytest.raises(UserError, match="no space left"):
            train_here(settings, *EMA)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    after = weights(run / "checkpoints" / "step-000002")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(run.rglob("*.building"))
    train_here(settings, *EMA)
    assert fingerprint(run) == fingerprint(whole)


def test_no_space_left_for_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", no_space)
    with pytest.raises(UserError, match="no space left"):
        journal.append_row(tmp_path / "metrics.jsonl", {"step": 1})


@pytest.mark.slow
def test_no_space_left_for_the_result(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood at adapter/ is untouched."""
    run = train_here(settings, "train.steps=2")
    before = weights(run / "adapter")
    with monkeypatch.context() as patch:
        import draftplus.models.tuned as module

        patch.setattr(module, "save_file", no_space)
        with pytest.raises(UserError, match="no space left"):
            train_here(settings)
    after = weights(run / "adapter")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_error_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), files.whole_directory(tmp_path / "a"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a"
    for text in ("one", "two"):
        with files.whole_directory(target) as building:
            (building / text).write_text(text)
    with pytest.raises(ZeroDivisionError), files.whole_directory(target) as building:
        (building / "three").write_text("three")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in target.iterdir()] == ["two"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "best.json"
    files.write_text(target, "one")
    monkeypatch.setattr(files, "_sync", no_space)
    with pytest.raises(UserError, match="no space left"):
        files.write_text(target, "two")
    assert target.read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_only_the_newest_are_kept(settings: list[str]) -> None:
    run = train_here(settings, "checkpoint.every=1", "checkpoint.keep=2", "eval.every=2")
    assert saved_steps(run / "checkpoints") == [3, 4]
    assert saved_steps(run / "adapters") == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_said(settings: list[str], name: str, whole: Path) -> None:
    """And removing it, as the message says, continues from the one before."""
    run = train_here(settings, *EMA)
    damaged = run / "checkpoints" / "step-000004"
    (damaged / name).write_bytes((damaged / name).read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        train_here(settings, *EMA)
    for path in damaged.iterdir():
        path.unlink()
    damaged.rmdir()
    train_here(settings, *EMA)
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_said(settings: list[str]) -> None:
    run = train_here(settings, "train.steps=2")
    config = (run / "config.yaml").read_text()
    assert "rank: 2" in config
    (run / "config.yaml").write_text(config.replace("rank: 2", "rank: 3"))
    (run / "origin.json").unlink()  # as in a run of an earlier version
    with pytest.raises(UserError, match="do not fit the model of this configuration"):
        train_here(settings, "model.lora.rank=3")
