"""The gate: the frozen model draws the first steps, in training and afterwards, and what it drew is used again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from draftplus.config import ObjectiveConfig
from draftplus.config.objective import DdpoConfig
from draftplus.config.schema import PrefixCacheConfig
from draftplus.diffusion.methods import METHODS, gated_steps
from draftplus.diffusion.objectives import gated, loss, plan, prefix
from draftplus.diffusion.policy import rollout, step_loss
from draftplus.diffusion.sampler import Rollout, sample
from draftplus.diffusion.schedule import make_schedule
from draftplus.errors import UserError
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.models.tuned import GATE, gate_of
from draftplus.training.reuse import PrefixCache, source, sources, uses
from tests.support.runs import fingerprint, rows, train_here, weights
from tests.support.steps import OBJECTIVES, take_steps
from tests.tiny import PROMPTS, SCHEDULER, gradients, noise_source, normal, problem, tiny_model

TOTAL, GUIDANCE = 5, 3.0


def test_the_frozen_model_is_itself_inside_folded_weights(model: StableDiffusion) -> None:
    """And the folded weights are back afterwards, also after an error."""
    x, given, t = normal(1, 4, 8, 8), model.encode(["a cat"]), torch.tensor(301)

    @torch.no_grad()
    def predict() -> Tensor:
        return model.predict(x, t, given)

    with model.tuned.reference():
        frozen = predict()
    tuned = predict()
    with model.tuned.folded():
        folded = predict()
        with pytest.raises(KeyError), model.tuned.reference():
            assert torch.equal(predict(), frozen)
            raise KeyError
        assert torch.equal(predict(), folded)
    assert torch.equal(predict(), tuned) and not torch.equal(folded, frozen)


@pytest.mark.parametrize(
    ("gate", "total", "expected"),
    [(0.0, 10, 0), (0.5, 10, 5), (0.5, 5, 3), (0.33, 6, 2), (0.667, 6, 4), (1 / 3, 6, 2), (0.9, 10, 9), (0.99, 4, 3)],
)
def test_the_nearest_number_of_steps_is_gated(gate: float, total: int, expected: int) -> None:
    assert gated_steps(gate, total) == expected


@pytest.mark.parametrize("method", ["draft", "draft_lv", "refl", "alignprop", "drtune"])
def test_no_step_before_the_gate_is_trained(method: str) -> None:
    schedule = make_schedule(SCHEDULER, 10)[0]
    all_steps = "all" if method in ("draft", "drtune") else 1
    objective = ObjectiveConfig(method, all_steps, gate=0.6)
    objective.refl.first = 0.0
    windows = [METHODS[method].window(objective, schedule, 0, step).steps for step in range(200)]
    assert min(min(window) for window in windows) == {"draft_lv": 9}.get(method, 6)
    if all_steps == "all":
        assert set(windows) == {(6, 7, 8, 9)}
    objective = ObjectiveConfig("drtune", 2, gate=0.6)
    spaced = {METHODS["drtune"].window(objective, schedule, 0, step).steps for step in range(50)}
    assert spaced == {(6, 8), (7, 9)}


@torch.no_grad()
def base_until(setting: Any, gate: int) -> Rollout:
    """The frozen model's steps, with the adapters off and nothing folded."""
    sampler, noise = setting.sampler, noise_source(3)
    with setting.model.tuned.reference():
        denoise = replace(sampler, gate=0).denoiser(setting.model.encode(PROMPTS))
        start, fresh = Rollout(noise("x_T", 0)), partial(noise, "solver")
        return sample(denoise, start, sampler.schedule, sampler.solver, end=gate, noise=fresh)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_what_is_trained_on_starts_where_the_frozen_model_leaves_off(
    model: StableDiffusion, solver: str, eta: float
) -> None:
    if solver == "dpmpp_2m" and eta:
        pytest.skip("DPM-Solver++ is deterministic")
    objective = ObjectiveConfig("draft", "all", gate=0.4, kl_coeff=0.3)
    setting = problem(model, objective, TOTAL, GUIDANCE, eta=eta, solver=solver)
    planned, noise, given = plan(objective, setting.sampler.schedule, 0, 0), noise_source(3), model.encode(PROMPTS)
    assert planned.window.steps == (2, 3, 4)
    with model.tuned.folded():
        start = prefix(setting, given, noise, planned)
    base = base_until(setting, 2)
    assert torch.equal(start.latents, base.latents)
    found = loss(setting, start, planned, given, PROMPTS, noise)
    plain = replace(setting, sampler=replace(setting.sampler, gate=0))
    expected = loss(plain, base, planned, given, PROMPTS, noise)
    assert torch.equal(found.value, expected.value) and torch.equal(found.images, expected.images)
    mine, theirs = (gradients(model.tuned.trainable(), one.value) for one in (found, expected))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with model.tuned.folded():  # in two pieces, as the cache has it
        begun = gated(setting, given, noise)
        assert torch.equal(begun.latents, base.latents)
        again = prefix(setting, given, noise, replace_window(planned, 3), begun)
    whole = prefix(setting, given, noise, replace_window(planned, 3))
    torch.testing.assert_close(again.latents, whole.latents, rtol=1e-10, atol=1e-12)


def replace_window(planned: Any, first: int) -> Any:
    return replace(planned, window=replace(planned.window, steps=tuple(range(first, TOTAL))), looks={})


def test_ddpo_learns_from_the_steps_after_the_gate(model: StableDiffusion) -> None:
    objective = ObjectiveConfig("ddpo", "all", gate=0.4, ddpo=DdpoConfig(eta=0.8))
    setting = problem(model, objective, TOTAL, GUIDANCE, eta=0.8)
    given = model.encode(PROMPTS)
    made, planned = rollout(setting, given, noise_source(3)), plan(objective, setting.sampler.schedule, 0, 0)
    assert torch.equal(made.latents[:, 2], base_until(setting, 2).latents)
    assert planned.window.steps == tuple(range(2, 2 + made.log_probs.shape[1]))
    for index in planned.window.steps:
        part = step_loss(setting, planned, made, index, given, torch.ones(3))
        assert part.ratios is not None and torch.allclose(part.ratios, torch.ones_like(part.ratios), atol=1e-12)


def test_each_batch_is_used_as_often_as_it_is_told() -> None:
    settings = PrefixCacheConfig(uses=3, batches=4)
    used = [source(settings, step, 7) for step in range(36)]
    for block in range(3):
        turns = [used[12 * block + 4 * turn : 12 * block + 4 * turn + 4] for turn in range(3)]
        assert all(sorted(turn) == list(range(4 * block, 4 * block + 4)) for turn in turns)
        assert turns[0] == sorted(turns[0])
    assert len({tuple(used[12 * block + at] - 4 * block for at in range(4, 12)) for block in range(3)}) > 1
    assert [source(PrefixCacheConfig(), step, 7) for step in range(20)] == list(range(20))
    assert sources(settings, range(2, 5), 7) == range(min(used[2:5]), max(used[2:5]) + 1)
    assert sources(settings, range(0), 7) == range(0)
    for number in set(used):
        assert uses(settings, number, 7) == [step for step in range(36) if used[step] == number]


def test_the_cache_is_bounded() -> None:
    cache, drawn = PrefixCache(2), []

    def get(number: int) -> None:
        cache.get(number, lambda: drawn.append(number) or Rollout(torch.zeros(1)))

    for number in (0, 1, 0, 1, 2, 1, 0):
        get(number)
    assert drawn == [0, 1, 2, 0]


GATED = ["objective.gate=0.34", "objective.grad_steps=1", "objective.kl_coeff=0.5", "objective.kl_steps=trajectory"]
REUSED = ["train.prefix_cache.uses=2", "train.prefix_cache.batches=2", "sampler.eta=0.5"]


@pytest.mark.slow
def test_a_cache_saves_passes_and_changes_nothing(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same run with nothing kept."""
    calls: list[int] = []
    predict = StableDiffusion.predict

    def counting(self: Any, x: Tensor, *more: Any) -> Tensor:
        calls.append(len(x))
        return predict(self, x, *more)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    more = [*GATED, *REUSED, "eval.every=100", "train.steps=8"]
    run = train_here(settings, *more, "name=kept")
    with_cache = sum(calls)
    calls.clear()
    monkeypatch.setattr(PrefixCache, "get", lambda self, number, draw: draw())
    other = train_here(settings, *more, "name=drawn")
    assert sum(calls) - with_cache == 4 * 4 * 2  # 4 second uses of 4 images, doubled by guidance, of 1 gated step
    assert fingerprint(run) == fingerprint(other)
    first, second = rows(run / "metrics.jsonl"), rows(other / "metrics.jsonl")
    assert [row["reward"] for row in first] == [row["reward"] for row in second]


@pytest.mark.slow
def test_a_gated_run_continues_as_if_it_had_never_stopped(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a turn, where the cache is empty again; later it is used again."""
    known: list[bool] = []
    get = PrefixCache.get

    def noting(self: PrefixCache, number: int, draw: Any) -> Rollout:
        known.append(number in self._known)
        return get(self, number, draw)

    monkeypatch.setattr(PrefixCache, "get", noting)
    more = [*GATED, *REUSED]
    whole = train_here(settings, *more, "train.steps=7", "name=whole")
    assert known == [False, False, True, True, False, False, True]
    train_here(settings, *more, "train.steps=3", "name=parts")
    known.clear()
    parts = train_here(settings, *more, "train.steps=7", "name=parts")
    assert known == [False, False, False, True]
    assert fingerprint(parts) == fingerprint(whole)
    mine, theirs = weights(parts / "adapter"), weights(whole / "adapter")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_weights_remember_their_gate(settings: list[str], tiny_path: Path, lora: bool) -> None:
    more = [] if lora else ["model.lora=null"]
    run = train_here(settings, "objective.gate=0.34", *more, "train.steps=1")
    file = next((run / "adapter").glob("*.safetensors"))
    assert gate_of(file) == 0.34
    again = train_here(settings, *more, "train.steps=1", "name=plain")
    with safe_open(next((again / "adapter").glob("*.safetensors")), "pt") as opened:
        assert GATE not in (opened.metadata() or {})


def test_a_gate_that_is_none_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    made = tiny_model(tiny_path, trainable=False)
    trained = tiny_model(tiny_path)
    trained.tuned.gate = 0.25
    trained.tuned.save(tmp_path / "good")
    made.tuned.load(tmp_path / "good")
    assert made.tuned.gate == 0.25
    trained.tuned.gate = 3.0
    trained.tuned.save(tmp_path / "bad")
    with pytest.raises(UserError, match=r"draftplus\.gate in its header is '3\.0'"):
        made.tuned.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["objective.gate=0.1"], "which is none of sampler.steps=3"),
        (["objective.gate=0.95"], "which is all of sampler.steps=3"),
        (["objective.gate=0.34", "objective.grad_steps=3"], "leaves 2 of 3 steps"),
        (["train.prefix_cache.uses=2"], "without a gate there is nothing to keep"),
        (
            ["objective.method=ddpo", "objective.grad_steps=all", "objective.gate=0.34", "train.prefix_cache.uses=2"],
            "method ddpo needs new trajectories",
        ),
        (["objective.gate=0.34", "objective.method=drtune", "objective.drtune.early_stop=2"], "must be below 2, the"),
        (["objective.gate=0.34", "objective.method=alignprop", "objective.alignprop.max_steps=3"], "<= 2, the steps"),
    ],
)
def test_what_does_not_fit_a_gate_is_refused(settings: list[str], given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_here(settings, *given)


def test_without_a_gate_and_a_coefficient_nothing_changes(model: StableDiffusion) -> None:
    """Bit for bit, also with the keys spelled out."""
    plain = OBJECTIVES["draft"]
    same = replace(plain, gate=0.0, kl_steps="trajectory", kl_prefix_coeff=0.0)
    ours, theirs = (take_steps(model, one, 2, None) for one in (same, plain))
    assert torch.equal(ours.update, theirs.update) and ours.metrics == theirs.metrics
