"""The announcement's line of NeMo-Aligner, as docs/from-nemo-aligner.md translates it, with files of the same kinds."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftplus import api
from draftplus.rewards.clip import EMOJI_CLIP
from tests.support.ldm import unet_as_ldm
from tests.support.nemo import clip_nemo, unet_as_nemo
from tests.support.processes import ROOT
from tests.support.runs import ANIMALS, rows, train_here
from tests.tiny import save_tiny, stock_pipeline

PAGE = ROOT / "docs" / "from-nemo-aligner.md"


def shown() -> list[str]:
    """The words of the line after `draftplus train`."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(r"^torchrun --nproc_per_node=2 -m draftplus train (.*)$", text, re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


@pytest.fixture
def files(small: Path, tmp_path: Path) -> Path:
    """A directory with what the line names: prompts, a UNet, an autoencoder, and a reward, all random and tiny.

    unet, vae: the weights of the former two in diffusers' layout, other than those of the recipe's model.
    """
    unet = load_file(save_tiny(tmp_path / "other", seed=3) / "unet" / "diffusion_pytorch_model.safetensors")
    vae = {name: 0.9 * t for name, t in load_file(small / "vae" / "diffusion_pytorch_model.safetensors").items()}
    torch.save({"unet": unet, "vae": vae}, tmp_path / "parts.pt")
    torch.save(
        {"state_dict": unet_as_nemo(unet_as_ldm(unet), "model.diffusion_model.")}, tmp_path / "unet_weights.ckpt"
    )
    torch.save(vae, tmp_path / "vae_weights.bin")
    with tarfile.open(tmp_path / "train_dataset.tar", "w") as tar:
        for i, animal in enumerate(ANIMALS):
            entry, data = tarfile.TarInfo(f"sample{i:06d}.txt"), f"a {animal}".encode()
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    clip_nemo(tmp_path / "reward_model.nemo")
    api.convert_reward(tmp_path / "reward_model.nemo", tmp_path / "reward_model", str(EMOJI_CLIP))
    (tmp_path / "sd15.yaml").write_text(f"""
model: {{path: {small}, lora: {{rank: 2, alpha: 2}}}}
device: cpu
sampler: {{steps: 3, guidance_scale: 7.5}}
objective: {{kl_coeff: 1.0}}
reward: pickscore
optim: {{grad_clip: 10.0, ema: 0.9999}}
train: {{steps: 2}}
eval: {{every: 100, images_per_prompt: 2}}
""")  # what stands for the recipe of that name, for a model of a second
    return tmp_path


@pytest.mark.slow
def test_the_line_trains_on_two_processes(files: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process does, with the UNet, the autoencoder and the prompts of the files."""
    words = shown()
    assert words[0] == "sd15"
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "draftplus",
         "train", "sd15.yaml", *words[1:]],
        cwd=files, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, err = started.communicate(timeout=280)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, err
    given = dict(word.split("=", 1) for word in words[1:])
    run = files / given["output_dir"] / given["name"]

    steps = rows(run / "metrics.jsonl")
    batch, kl_coeff = int(given["train.global_batch_size"]), float(given["objective.kl_coeff"])
    assert [(row["images"], row["lr"]) for row in steps] == [(batch, 1e-4), (2 * batch, 1e-4)]
    assert steps[0]["kl"] == 0 < steps[1]["kl"]
    for row in steps:
        assert row["loss"] == pytest.approx(-row["reward"] + kl_coeff * row["kl"], rel=1e-5)
    monkeypatch.chdir(files)
    alone = train_here(["sd15.yaml", *words[1:]], "name=alone")
    for ours, other in zip(steps, rows(alone / "metrics.jsonl"), strict=True):
        assert [ours[key] for key in ("reward", "loss")] == pytest.approx([other[key] for key in ("reward", "loss")])
    held_out = rows(run / "eval.jsonl")[0]["lpips_per_prompt"].keys()
    assert held_out and held_out < {f"a {animal}" for animal in ANIMALS}

    pipe, parts = stock_pipeline(small, torch.float32), torch.load(files / "parts.pt")
    pipe.unet.load_state_dict(parts["unet"])
    pipe.vae.load_state_dict(parts["vae"])
    stock = pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    base = api.generate(str(run), ["a cat"], [0], lora_scale=0.0)
    assert torch.allclose(base, stock, atol=1e-4)
    assert not torch.equal(api.generate(str(run), ["a cat"], [0]), base)
