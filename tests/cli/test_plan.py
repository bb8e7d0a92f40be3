"""`draftplus plan` says what a run takes in memory, and what to switch on where it does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from draftplus.errors import UserError
from draftplus.planning.measure import Memory
from draftplus.planning.plan import MICRO, REMEDIES, SHARDING, bytes_of, changed, plan_memory
from tests.support.runs import configure, train_here

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GIB), ("24", 24 * GIB), ("24 GiB", 24 * GIB), ("1.5g", 3 * GIB // 2), ("512mb", GIB // 2),
     ("2TB", 2048 * GIB), ("4096B", 4096)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "24 GBs", "24XB", "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--memory '{text}'")):
        bytes_of(text)


def test_what_it_prints(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    """Without reading a weight or writing a file; the same passes as of a dry run."""
    before = sorted(tmp_path.rglob("*"))
    printed = draftplus("plan", *settings, "objective.kl_coeff=0.1", "--memory", "8GB", "--gpus", "2")
    assert (printed.code, printed.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "2 without gradient, 1 with gradient, 1 of the frozen model, each doubled by guidance" in printed.out
    assert re.search(r"peak +\d+\.\d MiB, in \w+; \d+\.\d MiB with gradient checkpointing on", printed.out)
    assert "fits              largest micro-batch that fits in 8.00 GiB" in printed.out
    assert re.search(r"with parallel.mode=shard the peak is \d+\.\d MiB, in \w+", printed.out)


def test_weights_are_not_read(
    draftplus: Callable[..., Any], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    for cls in (UNet2DConditionModel, CLIPModel, CLIPTextModel):
        monkeypatch.setattr(cls, "from_pretrained", read)
    assert draftplus("plan", *settings).code == 0


def test_advice_is_in_order_of_its_cost(settings: list[str]) -> None:
    """Each lowers the memory, in the order of the table, and the last is the first with which the run fits."""
    config = configure([*settings, "train.micro_batch_size=4", "objective.grad_steps=2", "device=cpu"])
    now = plan_memory(config).memory.peak
    limit = int(0.75 * now)
    found = plan_memory(config, limit)
    assert not found.fits and found.advice and found.fits_with_advice
    peaks = [now, *(one.memory.peak for one in found.advice)]
    assert all(later < 0.99 * earlier + 1 for earlier, later in pairwise(peaks))
    assert all(peak > limit for peak in peaks[:-1])
    order = [remedy.cost for remedy in REMEDIES]
    places = [order.index(one.cost) for one in found.advice]
    assert places == sorted(places)
    assert found.largest is not None and found.largest < 4


def test_nothing_fits_in_nothing(draftplus: Callable[..., Any], settings: list[str]) -> None:
    printed = draftplus("plan", *settings, "--memory", "1KB")
    assert printed.code == 0
    assert "does not fit" in printed.out and "and still it does not fit" in printed.out


def test_refusals(refused: Callable[..., None], settings: list[str]) -> None:
    refused(["plan", *settings, "--memory", "lots"], "--memory 'lots'", "24GB")
    refused(["plan", *settings, "--gpus", "0"], "--gpus 0")
    refused(["plan", *settings, "--gpus", "3"], "train.global_batch_size")
    refused(["plan", *settings, "parallel.mode=shard", "model.quantize=int8"], "model.quantize=int8 does not work")
    refused(["plan", *settings, "reward=clipp"], "unknown reward 'clipp'")
    refused(["plan", *settings, "model.path=/nowhere/model"], "/nowhere/model")


FULL, SHARDED = "model.lora=null", "parallel.mode=shard"


@pytest.mark.parametrize(
    "more", [[], [FULL], [FULL, SHARDED], [SHARDED], ["model.quantize=int8"], ["device=cuda"]], ids=" ".join
)
def test_every_advice_can_be_followed(settings: list[str], more: list[str]) -> None:
    """It is a configuration that training takes, and none that it was before."""
    config = configure([*settings, *more])
    memory = Memory({}, {}, {}, {"sampling": 1})
    followed = [remedy.settings(config, memory) for remedy in (*REMEDIES, *SHARDING)]
    given = [one for one in followed if one not in (None, MICRO)]
    assert len(given) > 3
    for one in given:
        assert one is not None and changed(config, *one.split()) != config
    quantises = any(one is not None and "quantize" in one for one in given)
    assert quantises == (more in ([], ["device=cuda"])) and ("model.quantize=nf4" in given) == (more == ["device=cuda"])


def test_a_run_is_planned_with_any_key_changed(draftplus: Callable[..., Any], settings: list[str]) -> None:
    """Also those that a run cannot be continued with."""
    run = train_here(settings, "train.steps=1")
    printed = draftplus("plan", run, "model.lora.rank=8")
    assert (printed.code, printed.err) == (0, "")
    ranks = [re.search(r"trained +([\d,]+)", draftplus("plan", run, f"model.lora.rank={rank}").out) for rank in (2, 8)]
    trained = [int(found[1].replace(",", "")) for found in ranks if found]
    assert trained[1] == 4 * trained[0] > 0
    assert "trained " + " " * 9 + f"{trained[1]:,}" in printed.out
