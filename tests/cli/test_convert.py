"""`draftplus reward convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftplus import api
from draftplus.rewards.clip import EMOJI_CLIP
from tests.support.nemo import SIZE, clip_nemo


def test_a_reward_of_nemo_becomes_a_directory_that_scores(draftplus: Callable[..., Any], tmp_path: Path) -> None:
    file, clip = clip_nemo(tmp_path / "reward.nemo"), tmp_path / "clip"
    done = draftplus("reward", "convert", file, "-o", clip, "--processor", EMOJI_CLIP)
    assert (done.code, done.err) == (0, "")
    assert str(clip / "model.safetensors") in done.out.splitlines()
    images = torch.rand(2, 3, 2 * SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    scores = api.load_reward("pickscore", str(clip), device="cpu")(images, ["a cat", "a dog"])
    assert scores.isfinite().all() and scores[0] != scores[1]


def test_what_is_refused_is_one_line(draftplus: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.nemo").write_text("text")
    for name in ("text.nemo", "none.nemo"):
        failed = draftplus("reward", "convert", tmp_path / name, "-o", tmp_path / "clip", "--processor", EMOJI_CLIP)
        assert failed.code == 2 and name in failed.err and len(failed.err.splitlines()) == 1
    assert not (tmp_path / "clip").exists()
