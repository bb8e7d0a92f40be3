"""`model.offload`: what is not needed is away, and nothing that is computed changes.

There may be no second device here, so the weights of a network that is sent away become NaN until it is back: whatever
used it meanwhile would show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from draftplus import api, build, distributed
from draftplus.distributed import Offload
from draftplus.errors import notice
from draftplus.models.embedding_store import CACHE
from draftplus.rewards.offloaded import networks_of
from tests.support.pipelines import save_pipeline
from tests.support.runs import REWARDS, small_settings, train_here
from tests.tiny import CPU
from tests.training.test_resume import assert_same_run

SHADE = f"{REWARDS}:Shade"
SCORED = ["reward.emoji_clip.weight=0.01", f"eval.rewards={{{SHADE}: {{}}}}", "objective.kl_coeff=0.5"]


class Elsewhere:
    """A stand-in for `move`, and for the memory that networks are sent to. away: what they were before, by network."""

    place = torch.device("meta")

    def __init__(self) -> None:
        self.away: dict[nn.Module, dict[str, Tensor]] = {}
        self.moves: list[tuple[str, str]] = []

    def move(self, network: nn.Module, device: torch.device) -> None:
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.moves.append((type(network).__name__, "leaves" if device == self.place else "comes"))
        if device == self.place:
            assert network not in self.away
            self.away[network] = {name: tensor.data.clone() for name, tensor in tensors.items()}
            for tensor in tensors.values():
                tensor.data.fill_(torch.nan if tensor.is_floating_point() else -(10**9))
        for name, before in self.away.pop(network).items() if device != self.place and network in self.away else ():
            tensors[name].data.copy_(before)

    def gone(self) -> set[str]:
        return {type(network).__name__ for network in self.away}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere()
    monkeypatch.setattr(distributed, "MEMORY", made.place)
    monkeypatch.setattr(distributed, "move", made.move)
    return made


@dataclass
class Watched:
    """Models that were built, and of each pass of a denoiser whether it carries gradient, and what is away."""

    models: list[Any] = field(default_factory=list)
    passes: list[tuple[bool, set[str]]] = field(default_factory=list)


@pytest.fixture
def watched(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched()
    build_model = build.build_model

    def built(*args: Any, **kwargs: Any) -> Any:
        model = build_model(*args, **kwargs)
        made.models.append(model)
        model.tuned.denoiser.register_forward_pre_hook(
            lambda *_: made.passes.append((torch.is_grad_enabled(), elsewhere.gone()))
        )
        return model

    for module in ("training.fine_tuning", "evaluation.gallery", "evaluation.evaluate"):
        monkeypatch.setattr(f"draftplus.{module}.build_model", built)
    return made


@pytest.fixture
def sdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a folder of embeddings of its own."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return save_pipeline("sdxl", tmp_path / "sdxl")


METHODS = {
    "draft": ["train.sampling_batch_size=2", "train.micro_batch_size=2", "objective.grad_steps=2"],
    "ddpo": ["objective.method=ddpo", "objective.grad_steps=all", "objective.ddpo.updates=2"],
    "draft_lv": ["objective.method=draft_lv"],
    "checkpointed": ["model.gradient_checkpointing=true", "model.dtype=bfloat16"],
}
SLOW = ("draft_lv", "checkpointed")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in METHODS])
def test_training(settings: list[str], method: str, request: pytest.FixtureRequest) -> None:
    settings = [*settings, *SCORED, *METHODS[method], "train.steps=2"]
    whole = train_here(settings, "name=whole")
    elsewhere, watched = request.getfixturevalue("elsewhere"), request.getfixturevalue("watched")
    run = train_here(settings, "model.offload=true")
    assert_same_run(run, whole)
    first, graded = watched.passes[:3], [away for graded, away in watched.passes if graded]
    assert all({"AutoencoderKL", "CLIPTextModel", "CLIPModel", "Shade"} <= away for _, away in first)
    assert len(graded) >= 2 and ("AutoencoderKL", "comes") in elsewhere.moves[4:]
    # what is held out and the text encoder are away in the passes with gradient too, and all in those of DDPO
    away = {"Shade", "CLIPTextModel"} | ({"AutoencoderKL", "CLIPModel"} if method == "ddpo" else set())
    assert all(away <= one for one in graded)


def test_encoders_of_sdxl(sdxl: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """They stay in memory otherwise."""
    settings = [*small_settings(sdxl, tmp_path), *SCORED, "train.steps=1", "sampler.height=64", "sampler.width=64"]
    whole = train_here(settings, "name=whole")
    watched = request.getfixturevalue("watched")
    assert_same_run(train_here(settings, "model.offload=true"), whole)
    assert watched.models[0]._encoders == {} and watched.models[0].pipe.text_encoder is None
    assert "AutoencoderKL" in watched.passes[0][1]


def test_a_run_that_is_continued(settings: list[str], request: pytest.FixtureRequest) -> None:
    """With the setting changed on the way, too."""
    settings = [*settings, *SCORED, "train.steps=3", "checkpoint.every=1", "eval.every=1"]
    whole = train_here(settings, "name=whole")
    train_here(settings, "train.steps=1")
    request.getfixturevalue("elsewhere")
    train_here(settings, "train.steps=2", "model.offload=true")
    assert_same_run(train_here(settings, "model.offload=false"), whole)


def test_generating_and_evaluating(settings: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = train_here(settings, "train.steps=1", "optim.lr=0.1", f"eval.rewards={{{SHADE}: {{}}}}")

    def work(*more: str) -> tuple[Any, Any]:
        out = tmp_path / str(len(more))
        made = api.write_images(
            out / "g", str(run), ["a cat", "a dog"], [1, 2], [*more, "train.sampling_batch_size=1"],
            rewards=["emoji_clip", SHADE],
        )  # fmt: skip
        table = api.evaluate(str(run), more, ["a cat"], 2, rewards=["emoji_clip"], output=out / "e")
        return [{**row, "file": None} for row in made], [row["metrics"] for row in table["targets"]]

    whole = work()
    watched = request.getfixturevalue("watched")
    assert work("model.offload=true") == whole
    assert all({"AutoencoderKL", "CLIPTextModel", "CLIPModel", "Shade"} <= away for _, away in watched.passes)


def test_a_cpu(capfd: Any) -> None:
    notice.cache_clear()
    network = nn.Linear(2, 2)
    offload = Offload(CPU, True)
    assert capfd.readouterr().err == "draftplus: model.offload=true has no effect on a CPU\n"
    offload.use(network)
    offload.idle()
    assert not offload.on and network.weight.device == CPU
    Offload(CPU, False)
    assert capfd.readouterr().err == ""


class Holder:
    def __init__(self) -> None:
        self.network, self.other = nn.Linear(2, 2), torch

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("made", "count"),
    [(lambda: build.build_reward("dissimilarity", build.RewardConfig(), CPU), 1), (Holder, 1),
     (lambda: Holder().__call__, 1), (lambda: (lambda images, prompts: images), 0)],
    ids=["dissimilarity", "object", "method", "function"],
)  # fmt: skip
def test_which_networks_a_reward_holds(made: Callable[[], Any], count: int) -> None:
    assert len(networks_of(made())) == count
