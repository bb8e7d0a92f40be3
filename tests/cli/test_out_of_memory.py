"""Out of memory: one line names the part and what to try, the last complete step is saved, and training goes on."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from draftplus.training.checkpoint import saved_steps
from tests.support import rewards

WORDS = "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 b"
PARTS = {
    "a pass of the denoiser over 4 images": (UNet2DConditionModel, "forward"),
    "decoding 2 images": (AutoencoderKL, "decode"),
    "reward 'tests.support.rewards:brightness' of 2 images": (rewards, "brightness"),
    "the backward pass of 2 images": (torch.Tensor, "backward"),
    "the optimizer's update": (torch.optim.AdamW, "step"),
}


@pytest.mark.parametrize("part", PARTS)
def test_training(draftplus: Any, settings: list[str], tmp_path: Path, monkeypatch: Any, part: str) -> None:
    """In the third step, where no checkpoint is due."""
    run, told = tmp_path / "runs" / "run", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    command = ["train", *settings, "reward=tests.support.rewards:brightness", "train.micro_batch_size=2"]
    command += ["data.images_per_prompt=2", "train.sampling_batch_size=4"]
    owner, name = PARTS[part]
    before = getattr(owner, name)

    @wraps(before)
    def full(*args: Any, **kwargs: Any) -> Any:
        if len((run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ()) == 2:
            raise told
        return before(*args, **kwargs)

    with monkeypatch.context() as there:
        there.setattr(owner, name, full)
        printed = draftplus(*command, *(["checkpoint.every=100"] if "update" not in part else []))
    assert printed.code == 1
    stopped, line = printed.err.splitlines()
    assert stopped == f"stopped after step 2; continue with: draftplus train {run}"
    assert line.startswith(f"draftplus: out of memory in {part}, ")
    for says in ("step 3, whose micro-batches have 2 images", "(CUDA out of memory. Tried to allocate 20.00 GiB)",
                 "lower train.micro_batch_size", "sampler.height", "model.gradient_checkpointing=true",
                 "model.dtype=bfloat16"):  # fmt: skip
        assert says in line
    assert saved_steps(run / "checkpoints") == [2]
    if owner is rewards:
        assert draftplus("train", run).code == 0 and saved_steps(run / "checkpoints")[-1] == 4


def test_generating(draftplus: Any, small: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError(WORDS)

    command = ["generate", small, "--prompt", "a cat", "--seeds", "0:3", "device=cpu", "-o", tmp_path / "out"]
    for owner, name, says in (
        (AutoencoderKL, "decode", "decoding 3 images"), (UNet2DConditionModel, "forward", "denoiser over 3 images"),
        (CLIPTextModel, "forward", "the text encoder"),
    ):  # fmt: skip
        with monkeypatch.context() as there:
            there.setattr(owner, name, full)
            printed = draftplus(*command)
        assert printed.code == 1 and len(printed.err.splitlines()) == 1
        assert f"{says}" in printed.err and "not enough memory" in printed.err
