"""Every family is trained in parts, its decoder too, as it is whole; here by one process, which has all parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from draftplus.config.schema import ParallelConfig
from draftplus.distributed import World
from draftplus.models import compiling
from draftplus.training import train as training
from draftplus.training.placement import Placement, Sharded
from tests.distributed.test_two_ranks import assert_nearly_equal
from tests.families.cases import ONCE, Case
from tests.support.runs import small_settings, train_here

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
METHODS = {
    "lora": ["objective.grad_steps=2", "model.gradient_checkpointing=true"],
    "full": ["model.lora=null", "optim.lr=1e-4"],
}


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def group() -> Iterator[None]:
    """What FSDP2 asks for, also of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_parts(config: ParallelConfig, here: World) -> Placement:
    """The decoder, too."""
    return Sharded(here, None, 0)


def settings_of(case: Case, directory: Path, tmp_path: Path, method: str) -> list[str]:
    height, width = case.sizes[1]
    return [
        *small_settings(directory, tmp_path), "train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=1",
        "eval.max_prompts=1", "objective.kl_coeff=0.5", f"sampler.height={height}", f"sampler.width={width}",
        f"sampler.guidance_scale={case.guided}", *METHODS[method],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "full") for name in ONCE), ("sdxl", "lora"), ("qwen_image", "lora")],
    indirect=["name"],
)
def test_in_parts(
    case: Case, directory: Path, tmp_path: Path, method: str, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(case, directory, tmp_path, method)
    alone = train_here(settings, "name=alone")
    monkeypatch.setattr(training, "make_placement", in_parts)
    assert_nearly_equal(train_here(settings, "name=parts"), alone)


@pytest.mark.parametrize(("name", "method"), [("sd3", "lora"), ("flux_dev", "full")], indirect=["name"])
def test_compiled_in_parts(
    case: Case, directory: Path, tmp_path: Path, method: str, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gathers a block's weights stays outside of what is compiled."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    settings = [*settings_of(case, directory, tmp_path, method), "train.compile=true"]
    torch._dynamo.reset()
    whole = train_here(settings, "name=whole")
    monkeypatch.setattr(training, "make_placement", in_parts)
    counters.clear()
    assert_nearly_equal(train_here(settings, "name=parts"), whole)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()
