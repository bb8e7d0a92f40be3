"""A model small enough that a whole run takes a second, and the settings of such a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from draftplus.config import Config, RewardConfig, load_config, trusting
from draftplus.runs.plan import plan_run
from draftplus.training.train import train
from tests.tiny import save_tiny

REWARDS = "tests.support.rewards"
ANIMALS = "cat dog bee fox pig cow hen ant bat elk emu rat owl yak ape cod eel jay ram gnu".split()


def save_small(directory: Path) -> Path:
    """The tiny pipeline with an autoencoder of factor 4: images of 32 pixels, which LPIPS takes."""
    from diffusers import AutoencoderKL

    save_tiny(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=32, scaling_factor=0.5,
        )  # fmt: skip
        vae.decoder.conv_out.weight.data *= 3  # so that pictures differ, and some pixels saturate
    vae.save_pretrained(directory / "vae")
    return directory


def small_settings(model: Path, directory: Path) -> list[str]:
    """A recipe in `directory`, to which a test adds `key=value`: a run of 4 steps in directory/runs/run.

    18 prompts to train on and 2 held out.
    """
    prompts = directory / "prompts.txt"
    prompts.write_text("".join(f"a {animal}\n" for animal in ANIMALS))
    recipe = directory / "small.yaml"
    recipe.write_text(f"""
name: run
output_dir: {directory / "runs"}
device: cpu
model: {{path: {model}, lora: {{rank: 2, alpha: 4}}}}
sampler: {{steps: 3}}
reward: {REWARDS}:redness
data: {{prompts: {prompts}}}
optim: {{lr: 0.01}}
train: {{steps: 4, global_batch_size: 4, micro_batch_size: 4}}
eval: {{every: 100, images_per_prompt: 2}}
checkpoint: {{every: 2}}
log: {{to: []}}
""")
    with trusting(True):  # once, as its user would
        load_config(recipe)
    return [str(recipe)]


def configure(settings: Sequence[str], reward: str | None = None, **args: Any) -> Config:
    """The configuration; with a reward of `tests.support.rewards` and its arguments, where one is named."""
    config = load_config(settings[0], settings[1:])
    if reward is not None:
        config.reward = {f"{REWARDS}:{reward}": RewardConfig(args=args)}
    return config


def train_here(settings: Sequence[str], *more: str, reward: str | None = None, **args: Any) -> Path:
    """Trains in this process. Returns the run directory."""
    config, run = plan_run(configure([*settings, *more], reward, **args), [])
    return train(config, run)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, all but how long things took."""
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read]


def weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, a denoiser or a checkpoint directory."""
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def fingerprint(run: Path) -> str:
    """A hash of the result and of every step's numbers."""
    tensors = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in weights(run / "adapter").items())
    return hashlib.sha256(tensors + json.dumps(rows(run / "metrics.jsonl")).encode()).hexdigest()


def update_of(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    """How far the weights moved, as one vector."""
    assert before.keys() == after.keys()
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    assert b.norm() > 0
    return float((a.double() - b.double()).norm() / b.double().norm())


def assert_nearly_equal(
    run: Path, alone: Path, directories: Sequence[str] = ("adapter", "adapters/step-000002")
) -> None:  # fmt: skip
    """In float32, where the order of sums shows."""
    base = weights(alone / "adapters" / "step-000000")
    for directory in directories:
        moved = update_of(base, weights(alone / directory))
        assert relative(update_of(base, weights(run / directory)), moved) < 1e-3
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = rows(run / name), rows(alone / name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"per_image", "lpips_per_prompt"}:
                assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6), key
            for key in mine.keys() & {"per_image", "lpips_per_prompt"}:
                assert mine[key].keys() == other[key].keys()
                for name in mine[key]:
                    assert mine[key][name] == pytest.approx(other[key][name], rel=1e-3, abs=1e-5), name
    pictures = [sorted(p.relative_to(r) for p in (r / "samples").rglob("*.png")) for r in (run, alone)]
    assert pictures[0] == pictures[1]
