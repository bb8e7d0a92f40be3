"""What is reckoned for processes that share a denoiser."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from draftplus.errors import UserError
from draftplus.planning.measure import Memory
from draftplus.planning.plan import plan_memory
from draftplus.planning.sharding import TOGETHER, blocks_of, frozen_parts, spread
from draftplus.planning.subject import Subject, subject
from tests.planning.conftest import FAMILIES, IMAGES, Configured, planned

LORA, FULL = "model.lora.rank=4", "model.lora=null"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_blocks(configured: Configured, name: str) -> None:
    """Each weight, adapters aside, is in one block, or in none; the largest is no larger than what is in any."""
    tuned: Any = subject(configured(name, "model.dtype=bfloat16")).model.tuned
    network = tuned.denoiser
    parts = tuned.blocks(network)
    whole = sum(one.nbytes for key, one in network.named_parameters() if "lora_" not in key)
    found = blocks_of(network, parts, wide=False)
    assert 0 < found.largest <= whole - found.rest
    assert found.largest * len(set(parts)) >= whole - found.rest
    assert found.gathered == found.rest + TOGETHER * found.largest
    wide = blocks_of(network, parts, wide=True)
    assert found.largest <= wide.largest <= 2 * found.largest


@pytest.fixture
def run(configured: Configured, request: pytest.FixtureRequest) -> tuple[Subject, Memory]:
    config = configured("sdxl", request.param, "optim.ema=0.9")
    return subject(config), planned(config)


@pytest.mark.parametrize("run", [LORA, FULL], indirect=True)
def test_one_process_holds_everything(run: tuple[Subject, Memory]) -> None:
    assert spread(run[1], run[0], 1) == run[1]


@pytest.mark.parametrize("run", [LORA], indirect=True)
def test_with_adapters_the_frozen_denoiser_alone_is_shared(run: tuple[Subject, Memory]) -> None:
    whole, shared = run[1], spread(run[1], run[0], 4)
    assert shared.weights["denoiser"] == pytest.approx(whole.weights["denoiser"] / 4, abs=1)
    for part in ("adapters", "autoencoder", "text encoders", "rewards"):
        assert shared.weights[part] == whole.weights[part]
    assert shared.trained == whole.trained
    assert whole.fixed - shared.fixed == whole.weights["denoiser"] - shared.weights["denoiser"]


@pytest.mark.parametrize("run", [FULL], indirect=True)
def test_with_full_fine_tuning_all_that_is_trained_is_shared(run: tuple[Subject, Memory]) -> None:
    whole, shared = run[1], spread(run[1], run[0], 4)
    for part in ("denoiser", "frozen copy"):
        assert shared.weights[part] == pytest.approx(whole.weights[part] / 4, abs=1)
    for part, count in whole.trained.items():
        assert shared.trained[part] == pytest.approx(count / 4, abs=1) and count > 0


@pytest.mark.parametrize("run", [LORA, FULL], indirect=True)
def test_more_processes_need_less_each_down_to_what_is_gathered(run: tuple[Subject, Memory]) -> None:
    found = [spread(run[1], run[0], ranks) for ranks in (2, 4, 8, 1_000_000)]
    for phase in found[0].phases:
        assert all(later.phases[phase] <= earlier.phases[phase] for earlier, later in pairwise(found))
    last = found[-1]
    assert last.phases["step"] >= last.weights["gathered"] + sum(last.kept.values()) + last.weights["autoencoder"]
    assert last.kept["window"] == run[1].kept["window"], "activations are each process's own"


@pytest.mark.parametrize("run", [FULL], indirect=True)
def test_gradients_are_whole_until_the_last_micro_batch(run: tuple[Subject, Memory]) -> None:
    whole, micro = run[1], replace(run[1], images={**run[1].images, "share": 2 * IMAGES})
    gradients = whole.trained["gradients"]
    more = spread(micro, run[0], 1_000).phases["step"] - spread(whole, run[0], 1_000).phases["step"]
    assert 0 < more <= gradients


@pytest.mark.parametrize(
    ("settings", "part", "divided"),
    [
        (["reward=pickscore"], "rewards", 630_766_080),  # the image tower's; less than all of CLIP ViT-H/14
        (["reward=aesthetic"], "rewards", 303_179_776),
        (["reward=pickscore", "parallel.shard_frozen_above=4GiB"], "rewards", 0),
        (["reward=pickscore", "parallel.shard_frozen_above=null"], "rewards", 0),
        (["reward=jpeg_compressibility"], "autoencoder", 0),
        (["reward=emoji_clip"], "rewards", 0),
    ],
)
def test_what_is_large_and_frozen_is_shared(
    configured: Configured, settings: list[str], part: str, divided: int
) -> None:
    config = configured("sd", LORA, *settings)
    run, whole = subject(config), planned(config)
    shared = spread(whole, run, 4)
    assert whole.weights[part] - shared.weights[part] == pytest.approx(4 * divided * 3 / 4, abs=1)
    for phase in ("sampling", "evaluation", "update"):
        assert (whole.phases[phase] - shared.phases[phase] > 2 * divided + 2**20) == bool(divided), phase


def test_a_decoder_is_shared_where_it_is_large(configured: Configured) -> None:
    run = subject(configured("sd", LORA, "parallel.shard_frozen_above=0"))
    assert frozen_parts(run)["autoencoder"] == [run.model.decoder]
    whole = planned(run.config)
    parts = [one.nbytes for one in run.model.decoder.parameters()]
    shared = spread(whole, run, 2)
    assert whole.weights["autoencoder"] - shared.weights["autoencoder"] == pytest.approx(sum(parts) / 2, abs=1)


def test_what_is_offloaded_is_not_shared_while_pictures_are_made(configured: Configured) -> None:
    config = configured("sd", LORA, "reward=pickscore")
    away = replace(config, device="cuda", model=replace(config.model, offload=True))
    here, offloaded = (spread(planned(one), subject(one), 4).phases["sampling"] for one in (config, away))
    run = subject(config)
    kept = spread(planned(config), run, 4).weights
    assert here - offloaded == pytest.approx(kept["autoencoder"] + kept["rewards"] + kept["text encoders"], abs=2)


def test_what_cannot_be_spread_has_no_such_plan(configured: Configured) -> None:
    """It is refused as training does, and beside another plan nothing is told of it."""
    assert plan_memory(configured("sd", "model.quantize=int8"), gpus=2).elsewhere is None
    assert plan_memory(configured("sd", FULL, "optim.name=adafactor"), gpus=2).elsewhere is None
    with pytest.raises(UserError, match=r"model.quantize=int8 does not work with parallel.mode=shard"):
        configured("sd", "model.quantize=int8", "parallel.mode=shard")


def test_a_part_of_the_processes_hold_a_denoiser(configured: Configured) -> None:
    shared = ["parallel.mode=shard", "train.global_batch_size=4"]
    two, four = (plan_memory(configured("sd", *shared, f"parallel.shard_size={n}"), gpus=4) for n in (2, 4))
    assert two.memory.weights["denoiser"] == pytest.approx(2 * four.memory.weights["denoiser"], abs=2)
    with pytest.raises(UserError, match=r"parallel.shard_size is 3, which does not divide --gpus 2"):
        plan_memory(configured("sd", "parallel.mode=shard", "parallel.shard_size=3"), gpus=2)


@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_plan_has_both(configured: Configured, mode: str) -> None:
    """Of a mode, and beside it of the other; the global batch is divided in both."""
    found = plan_memory(configured("sd", f"parallel.mode={mode}", FULL), gpus=2)
    assert found.elsewhere is not None and found.memory.images["share"] == 1
    whole, shared = (found.memory, found.elsewhere) if mode == "replicate" else (found.elsewhere, found.memory)
    assert shared.weights["denoiser"] == pytest.approx(whole.weights["denoiser"] / 2, abs=1)
    assert shared.images == whole.images
