"""Numbers that overflow in half precision are seen before anything is scored or saved, and their origin is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import draftplus
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.training.fine_tuning import FineTuning, fine_tuning
from draftplus.training.placement import Replicated
from draftplus.training.state import State, initial_state
from tests.cli.conftest import draftplus as command  # noqa: F401
from tests.support import rewards
from tests.support.runs import configure
from tests.tiny import CPU, normal, tiny_model

FLOAT16 = "model.dtype=float16"
DECODER = r"the images are not finite although the latents are: .* the autoencoder overflowed in float16"
DENOISER = r"the latents are not finite from sampling step 1 of 3 on: the denoiser overflowed in float16"


@pytest.fixture(scope="module")
def broken(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The small model, one tensor of which is as large as float16 can hold, and no larger."""

    def make(part: str, tensor: str, force_upcast: bool | None = None) -> Path:
        made = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(small, made)
        file = made / part / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights[tensor] = weights[tensor] / weights[tensor].abs().max() * 6e4
        save_file(weights, file, metadata={"format": "pt"})
        config = json.loads((made / "vae" / "config.json").read_text())
        config.pop("force_upcast")
        config |= {} if force_upcast is None else {"force_upcast": force_upcast}
        (made / "vae" / "config.json").write_text(json.dumps(config))
        return made

    return make


@pytest.fixture(scope="module")
def decoder(broken: Callable[..., Path]) -> Path:
    """Its autoencoder overflows, and its configuration says nothing about that, as Stable Diffusion 1.5's."""
    return broken("vae", "decoder.conv_in.weight")


@pytest.fixture(scope="module")
def denoiser(broken: Callable[..., Path]) -> Path:
    return broken("unet", "conv_in.weight")


def made_by(model: Path, *settings: str) -> torch.Tensor:
    return draftplus.generate(str(model), ["a cat"], [0], ["sampler.steps=3", "device=cpu", *settings])


def test_which_part_and_at_which_step(decoder: Path, denoiser: Path) -> None:
    for model, words in ((decoder, DECODER), (denoiser, DENOISER)):
        with pytest.raises(UserError, match=words):
            made_by(model, FLOAT16)
        assert made_by(model, "model.dtype=float32").isfinite().all()


def test_no_picture_is_saved(decoder: Path, tmp_path: Path, command: Any) -> None:  # noqa: F811
    common = ["--reward", "tests.support.rewards:redness", "-o", tmp_path / "out", FLOAT16, "sampler.steps=3"]
    for name, more in (("generate", ["--prompt", "a cat"]), ("evaluate", ["--images-per-prompt", "2"])):
        printed = command(name, decoder, *more, *common)
        assert printed.code == 2 and "autoencoder overflowed" in printed.err
        assert "nan" not in printed.out and not list((tmp_path / "out").rglob("*.png"))


def test_a_configuration_that_asks_for_float32_gets_it(broken: Callable[..., Path]) -> None:
    """As stock pipelines do for SDXL: float16 weights, and the float32 decoder's picture."""
    from diffusers import AutoencoderKL

    path = broken("vae", "decoder.conv_in.weight", True)
    model = tiny_model(path, dtype=torch.float16, trainable=False)
    stock = AutoencoderKL.from_pretrained(path / "vae", torch_dtype=torch.float16).float()
    latents = normal(2, 4, 8, 8).half().float()
    expected = (stock.decode(latents / stock.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(model.decode(latents), expected)
    assert model.unet.dtype == torch.float16
    refused = tiny_model(broken("vae", "decoder.conv_in.weight", False), dtype=torch.float16, trainable=False)
    assert not refused.decode(latents).isfinite().any()


def test_an_infinite_value_is_not_clamped_to_white(tiny_path: Path) -> None:
    model = tiny_model(tiny_path, dtype=torch.float16, trainable=False)
    model.vae.half().decoder.conv_out.bias.data.fill_(float("inf"))
    assert model.decode(normal(1, 4, 8, 8)).isnan().all()


def task_of(settings: list[str], model: Path, tmp_path: Path) -> tuple[FineTuning, State]:
    config = configure([*settings, f"model.path={model}", FLOAT16], "recorded")
    here = World(0, 1, CPU)
    config.sampler.guidance_scale = 7.5
    task = fine_tuning(config, tmp_path, Replicated(here), here)
    return task, initial_state(task.parameters, config.optim)


def test_training_does_not_blame_the_reward(
    settings: list[str], decoder: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees black images instead; and later in a run, one such step is skipped as any other."""
    seen: list[bool] = []
    redness = rewards.redness

    def looking(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        seen.append(bool((images == 0).all()))
        return redness(images, prompts)

    monkeypatch.setattr(rewards, "redness", looking)
    for model, words in ((decoder, DECODER), (denoiser, DENOISER)):
        task, state = task_of(settings, model, tmp_path)
        with pytest.raises(UserError, match=f"at step 1: {words}"):
            task.step(state, nullcontext)
        state.step, state.skipped_in_a_row = 5, 0
        means = task.step(state, nullcontext)
        assert state.skipped_in_a_row == 1 and means["clipped_fraction"] != means["clipped_fraction"]
    assert seen and all(seen)


def test_the_evaluation_inside_training(settings: list[str], decoder: Path, tmp_path: Path) -> None:
    task, state = task_of(settings, decoder, tmp_path)
    with pytest.raises(UserError, match=DECODER):
        task.evaluate(state.step, lambda done, note: None)
    assert not list(tmp_path.rglob("*.png"))


def test_a_reward_that_is_not_finite_is_not_averaged(small: Path, tmp_path: Path, command: Any) -> None:  # noqa: F811
    name = "tests.support.rewards:always_nan"
    printed = command(
        "generate", small, "--prompt", "a cat", "--seeds", "0:2", "--reward", name, "-o", tmp_path / "out",
        "sampler.steps=3",
    )  # fmt: skip
    assert printed.code == 2 and "is not finite for 2 of 2 images" in printed.err
    assert "nan" not in printed.out.lower()
    rows = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [row[f"reward/{name}"] for row in rows] == [None, None]
