"""Training as a user sees it: rewards rise, each method and kind of weights runs, and what is written is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import draftplus
from draftplus.build import build_model, build_reward
from draftplus.config import RewardConfig, load_config
from draftplus.config.schema import OptimConfig
from draftplus.errors import UserError
from draftplus.rewards.aesthetic import AESTHETIC
from draftplus.rewards.aesthetic import FILE as AESTHETIC_FILE
from draftplus.rewards.clip import CLIP_H, CLIP_SCORE, PICKSCORE_PROCESSOR
from draftplus.rewards.names import REWARDS as BUILT_IN
from draftplus.runs.journal import open_loggers
from draftplus.training.fine_tuning import total_steps
from draftplus.training.optim import learning_rate
from tests.support.processes import Child, command
from tests.support.runs import REWARDS, configure, fingerprint, relative, rows, train_here, update_of, weights
from tests.tiny import CPU

BRIGHT = "tests.support.rewards:brightness: {weight: -0.5, args: {gain: 3}}"
TWO = f"reward={{tests.support.rewards:redness: {{weight: 2.0}}, {BRIGHT}}}"


@pytest.mark.slow
@pytest.mark.parametrize("kl_coeff", [0.0, 0.02])
def test_the_reward_rises(settings: list[str], kl_coeff: float) -> None:
    run = train_here(settings, "train.steps=25", f"objective.kl_coeff={kl_coeff}")
    rewards = [row["reward"] for row in rows(run / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1
    before, after = (row["reward"] for row in rows(run / "eval.jsonl"))
    assert after > before + 1


@pytest.mark.slow
def test_the_kl_coefficient_holds_it_back(settings: list[str]) -> None:
    free, held = (
        rows(train_here(settings, f"name={c}", "train.steps=12", f"objective.kl_coeff={c}") / "metrics.jsonl")[-1]
        for c in (1e-9, 30.0)
    )
    assert held["kl"] < 0.5 * free["kl"]
    assert held["reward"] < free["reward"]


def test_rewards_are_logged_one_by_one(settings: list[str]) -> None:
    run = train_here(settings, TWO, "objective.kl_coeff=0.5", "eval.rewards={tests.support.rewards:by_prompt: {}}")
    red, bright = f"reward/{REWARDS}:redness", f"reward/{REWARDS}:brightness"
    for row in rows(run / "metrics.jsonl"):
        assert row["reward"] == pytest.approx(2 * row[red] - 0.5 * row[bright], rel=1e-5)
        assert row["loss"] == pytest.approx(-row["reward"] + 0.5 * row["kl"], rel=1e-5)
        assert 0 <= row["clipped_fraction"] <= 1
        assert f"reward/{REWARDS}:by_prompt" not in row, "a held-out reward is not optimised"
    for row in rows(run / "eval.jsonl"):
        assert {red, bright, f"reward/{REWARDS}:by_prompt"} <= row.keys()


@pytest.mark.slow
def test_rows_of_metrics(settings: list[str]) -> None:
    run = train_here(settings, "optim.warmup_steps=3", "train.micro_batch_size=2")
    recorded = rows(run / "metrics.jsonl")
    assert [row["step"] for row in recorded] == [1, 2, 3, 4]
    assert [row["images"] for row in recorded] == [4, 8, 12, 16]
    assert [row["lr"] for row in recorded] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    written = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "reward", "kl", "grad_norm", "clipped_fraction", "lr", "seconds", "images", "skipped"} <= (
        written.keys()
    )
    assert recorded[0]["kl"] == 0


def test_the_learning_rate_rises_then_stays() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert learning_rate(OptimConfig(lr=1.0), 0) == 1.0


@pytest.mark.slow
def test_the_gradient_is_clipped(settings: list[str]) -> None:
    """The norm that is logged is the one before; with a vanishing limit AdamW's epsilon rules and little moves."""
    free, clipped = (
        train_here(settings, f"name={limit}", "train.steps=1", "eval.every=1", f"optim.grad_clip={limit}")
        for limit in ("null", "1e-9")
    )
    norms = [rows(run / "metrics.jsonl")[0]["grad_norm"] for run in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3
    moved = [
        update_of(weights(run / "adapters" / "step-000000"), weights(run / "adapter")).norm() for run in (free, clipped)
    ]
    assert moved[1] < 0.5 * moved[0]


METHODS = {
    "draft-2": ["objective.grad_steps=2"],
    "draft-all": ["objective.grad_steps=all"],
    "draft_lv": ["objective.method=draft_lv"],
    "refl": ["objective.method=refl", "objective.refl.first=0.3"],
    "alignprop": ["objective.method=alignprop"],
    "drtune": ["objective.method=drtune", "objective.grad_steps=2", "objective.drtune.early_stop=1"],
    "x0": ["objective.grad_steps=2", "objective.kl_space=x0"],
    "dpm": ["sampler.solver=dpmpp_2m", "objective.grad_steps=2"],
    "eta": ["sampler.eta=0.5"],
    "checkpointing": ["model.gradient_checkpointing=true"],
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(settings: list[str], method: str) -> None:
    run = train_here(settings, "train.steps=2", "objective.kl_coeff=0.5", *METHODS[method])
    recorded = rows(run / "metrics.jsonl")
    assert [row["step"] for row in recorded] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in recorded)
    assert recorded[1]["kl"] > 0
    moved = update_of(weights(run / "adapters" / "step-000000"), weights(run / "adapter"))
    assert moved.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_in_half_precision(settings: list[str], dtype: str) -> None:
    """The trained weights and their update stay float32, and it is the run in float32 up to rounding: rewards and
    gradients differ by a few of the type's epsilons."""
    settings = [*settings, "sampler.guidance_scale=4"]  # guidance multiplies the rounding
    half, single = (train_here(settings, f"name={kind}", f"model.dtype={kind}") for kind in (dtype, "float32"))
    model = build_model(configure([*settings, f"model.dtype={dtype}"]).model, CPU)
    assert {parameter.dtype for parameter in model.tuned.trainable().values()} == {torch.float32}
    kept, reference = (weights(run / "checkpoints" / "step-000004") for run in (half, single))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    kind, epsilon = getattr(torch, dtype), torch.finfo(getattr(torch, dtype)).eps  # 2^-7 or 2^-10
    for name, tensor in kept.items():
        if name.startswith("weights"):
            assert relative(tensor.to(kind), tensor) > epsilon / 10, f"{name} was updated in {dtype}"
    gradients = [name for name in kept if "/exp_avg/" in name]  # AdamW's averages of them
    ours, theirs = (torch.cat([state[name].flatten() for name in gradients]) for state in (kept, reference))
    assert epsilon / 4 < relative(ours, theirs) < 10 * epsilon
    for row, other in zip(rows(half / "metrics.jsonl"), rows(single / "metrics.jsonl"), strict=True):
        assert row["reward"] == pytest.approx(other["reward"], abs=20 * epsilon)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=5 * epsilon)


@pytest.mark.slow
def test_full_fine_tuning(settings: list[str]) -> None:
    """Trains, holds to the frozen copy, saves a denoiser that diffusers loads, and continues exactly."""
    from diffusers import UNet2DConditionModel

    full = [*settings, "model.lora=null", "objective.kl_coeff=0.5", "optim.lr=0.001", "optim.ema=0.5"]
    whole = train_here(full, "name=whole")
    recorded = rows(whole / "metrics.jsonl")
    assert recorded[0]["kl"] == 0 and recorded[-1]["kl"] > 0
    assert recorded[-1]["reward"] > recorded[0]["reward"]
    loaded = UNet2DConditionModel.from_pretrained(whole / "adapter").state_dict()
    kept = weights(whole / "checkpoints" / "step-000004")
    assert loaded.keys() == {name.split("/", 1)[1] for name in kept if name.startswith("ema")}
    assert all(torch.equal(tensor, kept[f"ema.safetensors/{name}"]) for name, tensor in loaded.items())
    run = train_here(full, "train.steps=2")
    train_here(full)
    assert fingerprint(run) == fingerprint(whole)


def test_epochs_instead_of_steps(settings: list[str]) -> None:
    config = configure([*settings, "train.epochs=2", "train.steps=null"])
    assert total_steps(config, 18) == 9
    assert total_steps(configure([*settings, "train.epochs=1"]), 17) == 5


@pytest.mark.slow
def test_the_run_directory(settings: list[str], tmp_path: Path) -> None:
    """Holds what the documentation lists; its config.yaml is complete and repeats the run."""
    run = draftplus.train(settings[0], ["eval.every=2", "log.to=[tensorboard]"])
    assert run == tmp_path / "runs" / "run"
    for name in (
        "config.yaml", "metrics.jsonl", "eval.jsonl", "samples/step-000002/grid.png", "adapters/step-000002",
        "checkpoints/step-000004", "adapter/pytorch_lora_weights.safetensors", "best.json", "report.html",
        "tensorboard",
    ):  # fmt: skip
        assert (run / name).exists(), name
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    again = train_here([str(run / "config.yaml")], "name=again", "log.to=[]")
    assert fingerprint(again) == fingerprint(run)


def test_the_name_is_of_what_shapes_the_run(settings: list[str], tmp_path: Path) -> None:
    from draftplus.runs.plan import plan_run

    _, one = plan_run(settings[0], ["name=null"])
    _, same = plan_run(settings[0], ["name=null", "train.steps=9", "eval.every=1", "log.to=[tensorboard]"])
    _, other = plan_run(settings[0], ["name=null", "optim.lr=0.5"])
    assert one == same != other
    assert one.parent == tmp_path / "runs" and one.name.startswith("small-")


@pytest.mark.slow
def test_tensorboard_keeps_every_step_once(settings: list[str]) -> None:
    """Also where a run is continued."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 4):
        run = train_here(settings, "log.to=[tensorboard]", f"train.steps={steps}", "eval.every=2")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars(f"held_out/reward/{REWARDS}:redness")] == [0, 2, 4]
    recorded = [row["reward"] for row in rows(run / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx(recorded, rel=1e-5)


def test_loggers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown logger 'tensorbord'"):
        open_loggers(["tensorbord"], tmp_path, {}, 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install draftplus\[wandb\]"):
        open_loggers(["wandb"], tmp_path, {}, 0)


@pytest.mark.slow
def test_two_processes_in_one_directory(settings: list[str], tmp_path: Path) -> None:
    """The second leaves the first alone."""
    (tmp_path / "wait-in-evaluation").touch()
    first: Child = command(["train", *settings, f"reward={REWARDS}:patient"], tmp_path)
    first.wait_until((tmp_path / "waiting").exists)
    before = (tmp_path / "runs" / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="another process"):
        train_here(settings, f"reward={REWARDS}:patient", "train.steps=9")
    assert (tmp_path / "runs" / "run" / "config.yaml").read_text() == before
    first.process.kill()
    first.wait()
    train_here(settings, f"reward={REWARDS}:patient")  # what a killed process held is free


NO_PROCESSOR = r"' has no preprocessor_config\.json on the hub .*: set args\.proc"
ON_THE_HUB = {  # and what each says of what it asks for first
    "pickscore": PICKSCORE_PROCESSOR + NO_PROCESSOR,
    "clip_score": CLIP_SCORE + NO_PROCESSOR,
    "clip_h": CLIP_H + NO_PROCESSOR,
    "hpsv2": rf"{CLIP_H}' has no tokenizer\.json on the hub .*: set args\.proc",
    "aesthetic": rf"needs {re.escape(AESTHETIC_FILE)} of '{AESTHETIC}', which is not on this disk",
    "image_reward": r"needs ImageReward\.pt of .zai-org/ImageReward., which is not on this disk",
    "hpsv3": r"needs HPSv3\.safetensors of .MizzenAI/HPSv3., which is not on this disk",
    "mps": r"needs model\.safetensors of 'RE-N-Y/mpsv1', which is not on this disk",
    "clip": r"set reward\.clip\.path",
}


@pytest.mark.parametrize(("name", "says"), ON_THE_HUB.items())
def test_rewards_on_the_hub_say_what_cannot_be_had(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # where nothing was fetched before
    with pytest.raises(UserError, match=says):
        build_reward(name, RewardConfig(), CPU)


@pytest.mark.parametrize("name", sorted(BUILT_IN.keys() - ON_THE_HUB))
def test_built_in_rewards_resolve(name: str) -> None:
    """Each other name of the table leads to a reward with gradient to the images."""
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    reward = build_reward(name, RewardConfig(), CPU)
    scores = reward(images, ["a cat", "a dog"])
    assert scores.shape == (2,)
    scores.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_unknown_rewards_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'jpeg_compressibility'"):
        build_reward("jpeg_compresibility", RewardConfig(), CPU)


def test_the_package_is_cheap_to_import() -> None:
    code = (
        "import draftplus, sys; assert 'torch' not in sys.modules; draftplus.Config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_python_interface(small: Path, settings: list[str], tmp_path: Path) -> None:
    """What the commands do, functions do."""
    config = draftplus.load_config(settings[0], ["train.steps=2"])
    run = draftplus.train(config)
    images = draftplus.generate(str(run), ["a cat"], range(3))
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    distances = draftplus.pairwise_lpips(images)
    assert distances.shape == (3, 3) and (distances.diagonal() == 0).all() and distances[0, 1] > 0
    reward = draftplus.load_reward(f"{REWARDS}:brightness", args={"gain": 2.0}, device="cpu")
    assert reward(images, ["a cat"] * 3).tolist() == pytest.approx((2 * images.mean((1, 2, 3))).tolist())
    model = draftplus.load_model(str(small), "cpu", run / "adapter")
    assert model.encode(["a cat"]).hidden.shape == (1, 16, 8)
    assert draftplus.write_report(run) == run / "report.html"
    with pytest.raises(draftplus.UserError, match="nowhere': no such directory"):
        draftplus.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(AttributeError, match="nothing"):
        draftplus.nothing  # noqa: B018
    assert set(draftplus.__all__) >= {"generate", "load_model", "load_reward", "pairwise_lpips", "train"}
    assert load_config(run / "config.yaml").train.steps == 2
