"""DDPO runs: as whole as other runs, with any reward, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from draftplus.config import Config, ObjectiveConfig
from draftplus.config.objective import DdpoConfig
from draftplus.config.schema import TrainConfig
from draftplus.distributed import World
from draftplus.errors import Interrupted, UserError
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.runs.directory import saved_steps
from draftplus.training import ddpo
from draftplus.training.ddpo import ddpo_step, interleaved
from draftplus.training.placement import Replicated
from draftplus.training.state import initial_state, whole_or_not
from draftplus.training.step import Setup
from tests.support.runs import REWARDS, fingerprint, rows, train_here, weights
from tests.tiny import CPU, PROMPTS, SHAPE, problem

pytestmark = pytest.mark.slow

DDPO = ["objective.method=ddpo", f"reward={REWARDS}:measured_only"]
SEVERAL = [
    *DDPO, "objective.ddpo.inner_epochs=2", "objective.ddpo.updates=2", "objective.ddpo.history=3",
    "objective.ddpo.min_history=2", "objective.kl_coeff=0.5", "optim.ema=0.9", "data.images_per_prompt=2",
]  # fmt: skip


def history(run: Path, step: int) -> Any:
    return json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["history"]


def test_a_reward_without_gradient(settings: list[str]) -> None:
    """Trains, and every number that the contract names is there."""
    run = train_here(settings, *DDPO)
    recorded = rows(run / "metrics.jsonl")
    common = {"step", "loss", "reward", f"reward/{REWARDS}:measured_only", "kl", "grad_norm", "clipped_fraction", "lr",
              "images", "skipped"}  # fmt: skip
    own = {"ratio", "approx_kl", "ratio_clipped", "advantage_mean", "advantage_std", "advantage_clipped"}
    assert all(row.keys() == common | {f"ddpo/{name}" for name in own} for row in recorded)
    assert [row["images"] for row in recorded] == [4, 8, 12, 16]
    for row in recorded:  # one update of each batch: nothing has moved yet
        assert row["ddpo/ratio"] == pytest.approx(1, abs=1e-6) and row["ddpo/approx_kl"] < 1e-12
        assert row["ddpo/ratio_clipped"] == 0 and row["kl"] == 0
        assert row["ddpo/advantage_std"] == pytest.approx(1, rel=1e-3) and row["grad_norm"] > 0
        assert row["loss"] == pytest.approx(0, abs=1e-6)  # minus the mean advantage
    base, tuned = weights(run / "adapters" / "step-000000"), weights(run / "adapter")
    assert any(not torch.equal(base[name], tuned[name]) for name in base)


def test_the_gradient_methods_still_refuse_it_and_say_who_does_not(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"has no gradient .* use objective\.method=ddpo"):
        train_here(settings, DDPO[1])


@pytest.mark.slow
def test_continued_is_uninterrupted(settings: list[str], tmp_path: Path) -> None:
    """With the rewards that it remembers, of three prompts that come again and again."""
    few = tmp_path / "few.txt"
    few.write_text("a cat\na dog\na bee\n")
    (tmp_path / "others.txt").write_text("a fox\n")
    settings = [*settings, *SEVERAL, f"data.prompts={few}", f"eval.prompts={tmp_path / 'others.txt'}"]
    whole = train_here(settings, "name=whole")
    train_here(settings, "train.steps=2")
    run = train_here(settings)
    assert fingerprint(run) == fingerprint(whole)
    assert history(run, 4) == history(whole, 4) != history(whole, 2)
    assert [len(known) for known in history(whole, 4).values()] == [3, 3, 3]


@pytest.mark.slow
def test_a_stop_between_updates_gives_up_the_whole_step(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*settings, *SEVERAL, "checkpoint.every=100"]
    whole = train_here(settings, "name=whole")
    accumulate, calls = ddpo.accumulate_update, []

    def stopped(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 4 * 2 + 3:  # in the third of four updates of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ddpo, "accumulate_update", stopped)
        train_here(settings)
    run = whole.parent / "run"
    assert saved_steps(run / "checkpoints") == [2]
    train_here(settings)
    assert fingerprint(run) == fingerprint(whole)


def made(model: StableDiffusion, micro: int, batch: int, steps: int, **settings: Any) -> Setup:
    objective = ObjectiveConfig("ddpo", "all", kl_coeff=0.5, ddpo=DdpoConfig(**settings))
    config = Config(objective=objective, train=TrainConfig(global_batch_size=batch))
    here = World(0, 1, CPU)
    return Setup(config, problem(model, objective, steps, eta=1.0), PROMPTS, SHAPE, micro, here, Replicated(here))


def test_an_error_leaves_the_state_as_it_was(model: StableDiffusion) -> None:
    setup = made(model, 2, 2, 2, inner_epochs=2)
    setup.config.optim.ema = 0.9
    state = initial_state(model.tuned.trainable(), setup.config.optim)
    for start in (0, 1):  # without moments, and with some
        before = {name: p.detach().clone() for name, p in state.parameters.items()}
        average = {name: tensor.clone() for name, tensor in state.ema.shadow.items()}  # type: ignore[union-attr]
        moments = [{k: v.clone() for k, v in entry.items()} for entry in state.optimizer.state.values()]
        with pytest.raises(ZeroDivisionError), whole_or_not(state):
            ddpo_step(setup, state, nullcontext)
            assert any(not torch.equal(p, before[name]) for name, p in state.parameters.items())
            raise ZeroDivisionError
        assert all(torch.equal(p, before[name]) for name, p in state.parameters.items())
        assert all(torch.equal(tensor, average[name]) for name, tensor in state.ema.shadow.items())  # type: ignore[union-attr]
        assert state.ema.updates == 2 * start  # type: ignore[union-attr]
        after = [dict(entry) for entry in state.optimizer.state.values()]
        assert len(after) == len(moments) == start * len(before)
        assert all(torch.equal(a[k], b[k]) for a, b in zip(after, moments, strict=True) for k in b)
        if start == 0:
            ddpo_step(setup, state, nullcontext)


class Saved:
    """How much is held for backward passes at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        size = tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        saved = self

        class Held:
            value = tensor

            def __del__(self) -> None:
                saved.now -= size

        return Held()


def test_what_the_backward_pass_holds_grows_neither_with_steps_nor_with_the_batch(model: StableDiffusion) -> None:
    peaks = []
    for batch, steps in ((2, 2), (2, 4), (4, 2)):
        setup, saved = made(model, 2, batch, steps), Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.value):
            ddpo_step(setup, initial_state(model.tuned.trainable(), setup.config.optim), nullcontext)
        peaks.append(saved.peak)
    assert peaks[0] > 0 and max(peaks) <= 1.01 * peaks[0]


def test_updates_share_the_batch_alike_on_any_number_of_ranks() -> None:
    """Each update has the same images, in whatever shares the ranks hold them."""
    assert interleaved(8, 2) == [0, 2, 4, 6, 1, 3, 5, 7]
    halves = [[4 * rank + row for row in interleaved(4, 2)] for rank in range(2)]
    assert [halves[0][:2] + halves[1][:2], halves[0][2:] + halves[1][2:]] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_updates_do_not_change_whom_an_image_is_compared_with(settings: list[str]) -> None:
    """A prompt's images are next to one another where they are scored, however the updates take them."""
    alike = ["reward={dissimilarity: {args: {same_prompt: true}}}", "data.images_per_prompt=2", "train.steps=1"]
    alike += ["objective.method=ddpo", "train.global_batch_size=8", "train.micro_batch_size=4"]
    once, twice = (train_here(settings, *alike, f"objective.ddpo.updates={n}", f"name=u{n}") for n in (1, 2))
    first, second = (rows(run / "metrics.jsonl")[0]["reward"] for run in (once, twice))
    assert first == pytest.approx(second, rel=1e-5) and first != 0


def test_a_step_that_is_not_finite_counts_once_however_many_updates(settings: list[str]) -> None:
    more = [DDPO[0], "objective.ddpo.inner_epochs=12"]
    run = train_here(settings, *more, reward="NanAt", bad=[3])
    recorded = rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in recorded] == [0, 0, 1, 1] and recorded[2]["loss"] is None


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_skipped_and_not_remembered(settings: list[str]) -> None:
    more = [DDPO[0], "checkpoint.every=1", "checkpoint.keep=9", "objective.ddpo.history=16"]
    run = train_here(settings, *more, reward="NanAt", bad=[3])  # the first call evaluates the base model
    recorded = rows(run / "metrics.jsonl")
    assert [row["skipped"] for row in recorded] == [0, 0, 1, 1] and recorded[2]["loss"] is None
    before, during = (weights(run / "checkpoints" / f"step-{step:06d}") for step in (2, 3))
    assert all(torch.equal(before[name], during[name]) for name in before)
    assert history(run, 3) == history(run, 2) != history(run, 4)


def test_at_the_first_step_the_reward_is_named(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"reward '.*NanAt' is not finite at the first step"):
        train_here(settings, DDPO[0], reward="NanAt", bad=[1])


def test_what_it_refuses(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"global_batch_size=4 cannot be divided evenly by objective\.ddpo\.updates=3"):
        train_here(settings, *DDPO, "objective.ddpo.updates=3")
    with pytest.raises(
        UserError, match=r"reward\.emoji_clip\.args\.dropout is 0\.1, but method ddpo takes no gradient"
    ):
        train_here(settings, DDPO[0], "reward={emoji_clip: {args: {dropout: 0.1}}}")
    with pytest.raises(UserError, match=r"objective\.ddpo\.eta=1\.0 needs sampler\.solver=ddim"):
        train_here(settings, *DDPO, "sampler.solver=dpmpp_2m")


@pytest.mark.slow
def test_the_reward_rises(settings: list[str]) -> None:
    more = ["train.steps=25", "train.global_batch_size=16", "train.micro_batch_size=16", "optim.lr=0.02",
            "eval.images_per_prompt=16", "eval.every=25"]  # fmt: skip
    before, after = rows(train_here(settings, *DDPO, *more) / "eval.jsonl")
    (name,) = before["per_image"]
    gains = torch.tensor(after["per_image"][name]) - torch.tensor(before["per_image"][name])
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5
