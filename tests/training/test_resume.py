"""A run that is stopped, however, and continued is the run that was never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from draftplus import api
from draftplus.errors import UserError
from draftplus.runs.directory import saved_steps
from draftplus.runs.plan import plan_run
from draftplus.training import checkpoint
from draftplus.training.train import train
from tests.support.processes import Child, command
from tests.support.runs import REWARDS, fingerprint, rows, train_here, weights

SHAPING = ["optim.ema=0.9", "optim.warmup_steps=5", "objective.kl_coeff=0.5", f"reward={REWARDS}:patient"]


def count(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def reached(metrics: Path, rows: int) -> bool:
    return count(metrics) >= rows


def assert_same_run(run: Path, whole: Path) -> None:
    assert fingerprint(run) == fingerprint(whole)
    assert rows(run / "eval.jsonl") == rows(whole / "eval.jsonl")
    last = saved_steps(whole / "checkpoints")[-1]
    for step in saved_steps(whole / "adapters"):
        ours, theirs = (weights(r / "adapters" / f"step-{step:06d}") for r in (run, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (weights(r / "checkpoints" / f"step-{last:06d}") for r in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "weights, moments or averages differ"
    assert (run / "best.json").read_text() == (whole / "best.json").read_text()


@pytest.mark.slow
def test_killed_three_times(settings: list[str], tmp_path: Path) -> None:
    settings = [*settings, *SHAPING, "train.steps=14", "eval.every=4", "checkpoint.every=2"]
    whole = train_here(settings, "name=whole")
    run, metrics = tmp_path / "runs" / "run", tmp_path / "runs" / "run" / "metrics.jsonl"
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    (tmp_path / "hold-at").write_text("13")  # so that it cannot end before it is killed
    for third in range(3):
        child = command(["train", *settings], tmp_path)
        target = max(count(metrics) + 1, moments.randint(1 + 4 * third, 4 + 4 * third))
        child.wait_until(partial(reached, metrics, target))
        time.sleep(moments.uniform(0, 0.5))
        child.process.kill()
        child.wait()
        assert count(metrics) < 14, "it had ended before it was killed"
    (tmp_path / "hold-at").unlink()
    assert command(["train", *settings], tmp_path).wait() == 0
    try:
        assert_same_run(run, whole)
    except AssertionError as error:
        raise AssertionError(f"with moments drawn from seed {seed}: {error}") from error


def start_and_wait(settings: list[str], directory: Path, during: str) -> Child:
    """A run that has taken a step or more and now waits, in training or in evaluation, for a signal."""
    metrics = directory / "runs" / "run" / "metrics.jsonl"
    child = command(["train", *settings], directory)
    child.wait_until(lambda: count(metrics) >= 1)
    (directory / f"wait-in-{during}").touch()
    child.wait_until((directory / "waiting").exists)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("again", ["the same command", "the run directory"])
@pytest.mark.parametrize(
    ("number", "during"),
    [(signal.SIGTERM, "training"), (signal.SIGINT, "training"), (signal.SIGTERM, "evaluation")],
)
def test_asked_to_stop(settings: list[str], tmp_path: Path, number: int, during: str, again: str) -> None:
    """It abandons what is in flight, though that would take ten minutes, and loses no complete step."""
    settings = [*settings, *SHAPING, "train.steps=8", "eval.every=6", "checkpoint.every=100"]
    run = tmp_path / "runs" / "run"
    child = start_and_wait(settings, tmp_path, during)
    began = time.monotonic()
    child.signal(number)
    assert child.wait() == 1
    assert time.monotonic() - began < 20  # seconds even on a busy machine
    (tmp_path / f"wait-in-{during}").unlink()
    message = child.err.read_text()
    assert "Traceback" not in message
    assert f"draftplus train {run}" in message
    done = count(run / "metrics.jsonl")
    assert saved_steps(run / "checkpoints") == [done]
    assert done == 6 if during == "evaluation" else done < 8
    arguments = ["train", *settings] if again == "the same command" else ["train", str(run)]
    assert command(arguments, tmp_path).wait() == 0
    assert_same_run(run, train_here(settings, "name=whole"))


@pytest.mark.slow
def test_a_second_signal_does_not_break_the_saving(settings: list[str], tmp_path: Path) -> None:
    child = start_and_wait([*settings, *SHAPING, "checkpoint.every=100"], tmp_path, "training")
    for _ in range(20):
        if child.process.is_alive():
            child.signal(signal.SIGTERM)
    assert child.wait() in (1, -signal.SIGTERM)  # the second may come when all is saved and nobody listens any more
    run = tmp_path / "runs" / "run"
    assert saved_steps(run / "checkpoints") == [count(run / "metrics.jsonl")]


@pytest.mark.slow
def test_further_steps_continue_exactly(settings: list[str]) -> None:
    settings = [*settings, *SHAPING]
    whole = train_here(settings, "name=whole", "train.steps=7")
    run = train_here(settings, "train.steps=3")
    assert saved_steps(run / "checkpoints")[-1] == 3
    api.train(run, ["train.steps=7"])
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(settings: list[str]) -> None:
    settings = [*settings, "log.to=[tensorboard]", "eval.every=2", "optim.ema=0.9"]

    def files(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.suffix != ".html"}

    run = api.train(plan_run(settings[0], settings[1:])[0])
    before = files(run)
    saved = run / "checkpoints" / "step-000004" / "weights.safetensors"
    written = saved.stat().st_mtime_ns
    for target, overrides in ((run, []), (settings[0], settings[1:])):
        config, same = plan_run(target, overrides)
        assert train(config, same) == run
    assert files(run) == before
    assert saved.stat().st_mtime_ns == written, "a complete checkpoint was written again"


@pytest.mark.slow
def test_the_result_is_of_the_last_step(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a longer run was killed between its last checkpoint and the writing of adapter/."""
    whole = train_here(settings, "name=whole", "train.steps=6")
    run = train_here(settings)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        import draftplus.training.drive as module

        save = module._save_weights
        patch.setattr(module, "_save_weights", lambda *to: killed() if to[2].name == "adapter" else save(*to))
        with pytest.raises(KeyboardInterrupt):
            train_here(settings, "train.steps=6")
    train_here(settings, "train.steps=6")
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_what_lies_past_the_restored_step_is_dropped(settings: list[str]) -> None:
    """Rows, samples, adapters and the best step of a stretch that is done again."""
    settings = [*settings, "checkpoint.every=3", "eval.every=2"]
    whole = train_here(settings, "name=whole", "train.steps=6")
    run = train_here(settings, "train.steps=3")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "reward": 99.0}) + "\n")
    late = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    with (run / "eval.jsonl").open("a") as file:
        file.write(json.dumps({**late, "step": 5, "reward": 99.0}) + "\n")
    for parent in ("samples", "adapters"):
        (run / parent / "step-000005").mkdir()
    (run / "best.json").write_text('{"step": 5}')
    train_here(settings, "train.steps=3")
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [0, 2, 3]
    assert saved_steps(run / "samples") == saved_steps(run / "adapters") == [0, 2, 3]
    assert json.loads((run / "best.json").read_text())["step"] in (2, 3)
    train_here(settings, "train.steps=6")
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_a_torn_last_row(settings: list[str]) -> None:
    run = train_here(settings, "train.steps=3")
    whole = train_here(settings, "name=whole", "train.steps=6")
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 4, "rew')
    train_here(settings, "train.steps=6")
    assert fingerprint(run) == fingerprint(whole)


def test_a_row_that_is_torn_elsewhere_is_an_error(settings: list[str]) -> None:
    run = train_here(settings, "train.steps=2")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 1\n' + text)
    with pytest.raises(UserError, match="line 1 is not JSON"):
        train_here(settings)


CHANGES = {
    "optim.lr": "0.5",
    "seed": "1",
    "sampler.steps": "4",
    "train.global_batch_size": "8",
    "objective.kl_coeff": "0.7",
    "model.lora.rank": "4",
}


@pytest.mark.slow
def test_a_changed_key_that_shapes_the_run_is_refused(settings: list[str]) -> None:
    run = train_here(settings, "train.steps=2")
    config = (run / "config.yaml").read_text()
    for key, value in CHANGES.items():
        for target in (settings[0], run):
            with pytest.raises(UserError, match=rf"{key}="):
                plan_run(target, [f"{key}={value}"])
    assert (run / "config.yaml").read_text() == config


@pytest.mark.slow
def test_keys_that_do_not_shape_it_may_change(settings: list[str]) -> None:
    run = train_here(settings, "train.steps=2")
    whole = train_here(settings, "name=whole")
    train_here(settings, "eval.every=3", "eval.images_per_prompt=3", "checkpoint.every=1", "checkpoint.keep=5",
               "train.sampling_batch_size=4")  # fmt: skip
    assert fingerprint(run) == fingerprint(whole)
    assert saved_steps(run / "checkpoints") == [2, 3, 4]
    assert rows(run / "eval.jsonl")[-1]["images"] == 6


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to continue from, so the same command starts anew, also with other settings."""
    settings = [*settings, "eval.every=1", "checkpoint.every=100"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        train_here(settings)
    run = train_here(settings, "optim.lr=0.02", "eval.every=3")
    assert fingerprint(run) == fingerprint(train_here(settings, "name=whole", "optim.lr=0.02"))
    assert saved_steps(run / "adapters") == saved_steps(run / "samples") == [0, 3, 4]


def test_a_result_without_a_checkpoint_is_not_overwritten(settings: list[str]) -> None:
    run = train_here(settings)
    before = weights(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    for target in (settings[0], run):
        with pytest.raises(UserError, match="no checkpoint to continue from"):
            plan_run(target, ["train.steps=9"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run / "adapter").items())


@pytest.mark.slow
def test_a_run_that_could_not_start_does_not_stand_in_the_way(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch_size=3"):
        train_here(settings, "train.micro_batch_size=3")
    with pytest.raises(UserError, match="carry no gradient"):
        train_here(settings, reward="detached")
    run = train_here(settings)
    assert fingerprint(run) == fingerprint(train_here(settings, "name=whole"))
    assert [row["step"] for row in rows(run / "eval.jsonl")] == [0, 4]
