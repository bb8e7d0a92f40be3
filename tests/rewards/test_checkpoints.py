"""Single files of weights: where they are looked for, what is refused, and what must fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from draftplus.errors import UserError
from draftplus.rewards.checkpoints import fit, load_weights_file

HALF = {"weight": torch.arange(6.0).reshape(2, 3).half(), "bias": torch.ones(2).half()}


def load(path: Any, filename: str = "head.pt") -> dict[str, torch.Tensor]:
    return load_weights_file(path, filename, None, "mine")


def saved(directory: Path) -> Path:
    torch.save({"state_dict": HALF, "epoch": 2}, directory / "head.pt")
    return directory


def test_a_file_and_a_directory_that_holds_it(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file(HALF, tmp_path / "other.safetensors")
    for found in (load(tmp_path), load(str(tmp_path / "head.pt"), "ignored.pt"), load(tmp_path / "other.safetensors")):
        assert found.keys() == HALF.keys() and all(torch.equal(found[name], HALF[name]) for name in HALF)


def test_a_file_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the hub's library leaves a download, so that nothing is fetched."""
    commit = "0" * 40
    snapshot = tmp_path / "models--some--reward" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    saved(snapshot)
    refs = tmp_path / "models--some--reward" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("some/reward").keys() == HALF.keys()
    assert load_weights_file("some/reward", "head.pt", commit, "mine").keys() == HALF.keys()


def test_offline_it_says_what_to_download_and_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("draftplus.rewards.checkpoints.why_offline", lambda: "HF_HUB_OFFLINE is set")
    words = (
        "reward 'mine' needs head.pt of 'some/absent', which is not on this disk, and HF_HUB_OFFLINE is set.\n"
        "Run: hf download some/absent head.pt --local-dir DIRECTORY, on a machine that reaches it; then "
        "reward.mine.path=DIRECTORY"
    )
    with pytest.raises(UserError) as caught:
        load("some/absent")
    assert str(caught.value) == words


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "ran")}, tmp_path / "head.pt")
    with pytest.raises(UserError, match="would run code"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_or_is_no_file_of_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match=r"reward.mine.path '.*' has no big.pt; it has head.pt"):
        load(tmp_path, "big.pt")
    with pytest.raises(UserError, match=r"reward.mine.path 'absent.pt': no such file"):
        load("absent.pt")
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "absent")
    (tmp_path / "old.nemo").touch()
    with pytest.raises(UserError, match="draftplus reward convert"):
        load(tmp_path / "old.nemo")
    with (tmp_path / "head.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    shutil.copy(__file__, tmp_path / "head.pt")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


def test_weights_are_widened_and_frozen() -> None:
    network = fit(lambda: nn.Linear(3, 2), HALF, "it", None)
    assert torch.equal(network.weight, HALF["weight"].float()) and network.weight.dtype == torch.float32
    assert not network.training and not any(one.requires_grad for one in network.parameters())
    assert fit(lambda: nn.Linear(3, 2), HALF, "it", torch.float64).weight.dtype == torch.float64


def test_weights_that_do_not_fit_are_named_and_counted() -> None:
    wrong = {"weight": torch.ones(2, 4), **{f"extra.{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(UserError) as caught:
        fit(lambda: nn.Linear(3, 2), wrong, "reward.mine.path 'x.pt'", None)
    assert str(caught.value) == (
        "reward.mine.path 'x.pt' has not the weights that this reward needs. Tensors 1 missing: bias; "
        "5 unknown: extra.0, extra.1, extra.2 and 2 more; 1 of another shape: weight (2, 4), not (2, 3)."
    )
