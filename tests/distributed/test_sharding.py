"""A model in parts on several processes is trained as the whole one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftplus.errors import UserError
from tests.distributed.test_two_ranks import assert_nearly_equal
from tests.support.pipelines import save_pipeline
from tests.support.processes import commands, compiled, ranks
from tests.support.runs import REWARDS, relative, rows, small_settings, train_here
from tests.support.steps import BATCH, OBJECTIVES, place_in_turn, take_steps, take_steps_in_parts, write_odd_rows
from tests.tiny import randomize, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


def on_ranks(directory: Path, size: int, *arguments: Any) -> list[dict[str, Any]]:
    children = ranks(take_steps_in_parts, arguments, directory, size)
    assert [child.wait() for child in children] == [0] * size, children[0].err.read_text()
    return [torch.load(directory / f"rank{rank}" / "updates.pt") for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "within", "full", "methods", "micro"),
    [
        (2, None, True, ["draft", "draft_lv", "gated", "ddpo-updates"], 1),
        (2, None, False, ["draft", "trajectory", "ddpo-gated"], 1),
        (4, None, True, ["draft"], 1),
        (4, 2, True, ["draft"], 1),
    ],
    ids=["full", "lora", "four", "hybrid"],
)
def test_parts_equal_the_whole(
    tiny_path: Path, tmp_path: Path, size: int, within: int | None, full: bool, methods: list[str], micro: int
) -> None:
    model = tiny_model(tiny_path, full=full)
    randomize(model)
    results = on_ranks(tmp_path, size, str(tiny_path), full, methods, within, micro)
    for method in methods:
        alone = take_steps(model, OBJECTIVES[method], BATCH, None, keeps=False)
        for result in results:
            made = result["made"][method]
            assert relative(made["update"], alone.update) < 1e-9, method
            for name, value in made["metrics"].items():
                assert value == pytest.approx(alone.metrics[name], rel=1e-9, abs=1e-14), (method, name)
            for name, numbers in made["held"].items() if full else ():
                assert numbers <= 1.1 * alone.held[name] / (within or size), name
    for number, network in enumerate(model.tuned.networks()):
        everything = sum(p.numel() for p in network.parameters())
        adapters = 0 if full else sum(p.numel() for p in model.tuned.trainable().values())
        for result in results:
            assert result["held"][number] - adapters <= 1.1 * (everything - adapters) / (within or size)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_do_not_divide(tmp_path: Path, rows: int) -> None:
    children = ranks(write_odd_rows, [rows], tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0], children[0].err.read_text()
    weight = load_file(tmp_path / "rank0" / "w.safetensors")["0.weight"]
    assert torch.equal(weight, torch.arange(2.0 * rows).view(rows, 2))


def test_one_process_of_a_machine_reads_at_a_time(tmp_path: Path) -> None:
    """Each has a whole network in memory until it is divided."""
    log = tmp_path / "log.txt"
    children = ranks(place_in_turn, [str(save_pipeline("sd3", tmp_path / "model")), str(log)], tmp_path, 3)
    assert [child.wait() for child in children] == [0] * 3, children[0].err.read_text()
    told = [("reads", "has divided"), ("reads rewards", "has placed them")]
    expected = [f"{rank} {what}" for pair in told for rank in range(3) for what in pair]
    assert log.read_text().splitlines() == expected


def run_on(size: int, settings: list[str], directory: Path) -> None:
    children = commands(["train", *settings, "--trust"], directory, size)
    assert [child.wait() for child in children] == [0] * size, children[0].err.read_text()


def test_a_run_on_four_two_and_one(settings: list[str], tmp_path: Path) -> None:
    """A denoiser that is fully tuned, in parts; its checkpoints are continued by fewer, and by one process alone."""
    settings = [
        *settings, f"reward={REWARDS}:by_prompt", "model.lora=null", "objective.kl_coeff=0.5", "eval.every=1",
        "train.micro_batch_size=1", "optim.ema=0.5", "optim.lr=1e-3",
    ]  # fmt: skip
    alone = train_here(settings, "name=alone")
    run = tmp_path / "runs" / "run"
    run_on(4, [*settings, "parallel.mode=shard", "train.steps=2"], tmp_path / "four")
    parts = sorted(path.name for path in (run / "checkpoints" / "step-000002").iterdir())
    shards = [f"shard-{number:05d}" for number in range(1, 5)]
    assert [name.partition("-model")[0] for name in parts] == ["SHA256SUMS", *shards, "state.json"]
    shard = next((run / "checkpoints" / "step-000002").glob("shard-00002*"))
    written = shard.read_bytes()
    for damaged in (written[:-8], bytes([*written[:-1], written[-1] ^ 1])):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"step-000002: damaged \(.*no other checkpoint is whole"):
            train_here(settings)
    shard.write_bytes(written)
    run_on(2, [*settings, "parallel.mode=shard", "train.steps=3"], tmp_path / "two")
    train_here(settings)
    assert_nearly_equal(run, alone)
    assert (run / "adapter" / "config.json").read_bytes() == (alone / "adapter" / "config.json").read_bytes()
    # and a checkpoint of one process is continued in parts
    run_on(2, [*settings, "parallel.mode=shard", "train.steps=5"], tmp_path / "again")
    train_here(settings, "name=alone", "train.steps=5")
    assert_nearly_equal(run, alone)


@pytest.mark.parametrize("more", [["model.dtype=bfloat16"], ["model.lora=null", "optim.lr=1e-4"]], ids=["lora", "full"])
def test_a_transformer(tmp_path: Path, more: list[str]) -> None:
    """With adapters the frozen weights are in bfloat16, and the passes that KL compares in float32."""
    model = save_pipeline("sd3", tmp_path / "model")
    settings = [
        *small_settings(model, tmp_path), "train.steps=2", "eval.max_prompts=2", "eval.every=2",
        "objective.kl_coeff=0.5", "objective.grad_steps=2", "sampler.height=64", "sampler.width=64",
        "model.gradient_checkpointing=true", "train.micro_batch_size=1", *more,
    ]  # fmt: skip
    run_on(2, [*settings, "name=replicated"], tmp_path / "replicated")
    run_on(2, [*settings, "name=sharded", "parallel.mode=shard"], tmp_path / "sharded")
    replicated, sharded = tmp_path / "runs" / "replicated", tmp_path / "runs" / "sharded"
    assert rows(replicated / "metrics.jsonl")[-1]["kl"] > 0
    assert_nearly_equal(sharded, replicated)


def test_compiled(settings: list[str], tmp_path: Path) -> None:
    settings = [
        *settings, "objective.kl_coeff=0.5", "train.micro_batch_size=1", "train.steps=2", "parallel.mode=shard",
        "model.gradient_checkpointing=true",
    ]  # fmt: skip
    run_on(2, [*settings, "name=plain"], tmp_path / "plain")
    children = ranks(compiled, [["train", *settings, "name=compiled", "train.compile=true"]], tmp_path / "compiled", 2)
    assert [child.wait() for child in children] == [0, 0], children[0].err.read_text()
    assert int(children[0].out.read_text().split()[-2]) > 1, "graphs"
    assert_nearly_equal(tmp_path / "runs" / "compiled", tmp_path / "runs" / "plain")
