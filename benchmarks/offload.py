"""What `model.offload` saves: a short training of published sizes, with random weights, without it and with it.

    python -m benchmarks.offload --json offload.json     on one GPU: SD1.5 and SDXL, a table for each
    python -m benchmarks.offload --only sdxl --size 1024
    python -m benchmarks.offload --device cpu --tiny     the same code on tiny models

A model is written to a temporary directory (SDXL takes 7 GB, the rewards 4 GB) and trained through the package: frozen
weights in bfloat16, LoRA on attention, gradient checkpointing, KL on, PickScore's shape as the reward and once more as
a held-out one. The run without the setting comes twice: some backward passes of a GPU add in no fixed order, so the
losses of two equal runs differ too, and the setting may change them no more than that.

- peaks: the highest that torch has allocated during evaluations, and during training steps.
- seconds: of the last training step.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import CLIP_H, SHAPES, component, made, making
from draftplus import api
from draftplus.build import quiet_libraries
from draftplus.config import load_config
from draftplus.models.single_file import CONFIGS, tokenizer
from draftplus.rewards.clip import EMOJI_CLIP
from draftplus.runs.journal import read_rows
from draftplus.training.fine_tuning import FineTuning

GIB = 2**30
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip
KEYS = ("loss", "reward", "kl", "grad_norm")


def save_model(name: str, directory: Path, device: torch.device) -> None:
    """A pipeline of a published size, with its text encoders, in bfloat16."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = SHAPES[name]
    parts = {component(shape): shape.denoiser, "vae": shape.vae}
    pipe: dict[str, Any] = {part: made(told, device, torch.bfloat16).cpu() for part, told in parts.items()}
    with making(device, torch.bfloat16):
        pipe["text_encoder"] = CLIPTextModel(CLIPTextConfig(**CLIP_L)).cpu()
        if name == "sdxl":
            pipe["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)).cpu()
    encoders = [part for part in pipe if part.startswith("text_encoder")]
    pipe |= {part.replace("text_encoder", "tokenizer"): tokenizer(CONFIGS / "sd1") for part in encoders}
    pipe["scheduler"] = getattr(diffusers, shape.scheduler[0]).from_config(dict(shape.scheduler[1]))
    if name == "sd15":
        pipe |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, shape.pipeline)(**pipe).save_pretrained(directory)


def save_reward(directory: Path, device: torch.device) -> None:
    """PickScore's shape, in half of its precision."""
    from transformers import CLIPConfig, CLIPModel

    with making(device, torch.bfloat16):
        CLIPModel(CLIPConfig(**CLIP_H)).cpu().save_pretrained(directory)
    tokenizer(CONFIGS / "sd1").save_pretrained(directory)
    told = json.loads((EMOJI_CLIP / "preprocessor_config.json").read_text(encoding="utf-8"))
    told |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (directory / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")


def overrides(model: Path, reward: Path | None, options: argparse.Namespace, output: Path) -> list[str]:
    rewards = [
        f"reward={{pickscore: {{path: {reward}, weight: 1.0e5}}}}", f"eval.rewards={{clip_score: {{path: {reward}}}}}"
    ] if reward else ["eval.rewards={clip_score: {path: " + str(EMOJI_CLIP) + "}}"]  # fmt: skip
    return [
        f"model.path={model}", f"output_dir={output}", f"device={options.device}", "model.dtype=bfloat16",
        "model.gradient_checkpointing=true", "objective.kl_coeff=0.1", f"sampler.height={options.size}",
        f"sampler.width={options.size}", f"sampler.steps={options.steps}", "sampler.guidance_scale=5", "train.steps=3",
        "train.global_batch_size=2", f"train.micro_batch_size={options.micro}", "eval.max_prompts=1",
        "eval.images_per_prompt=2", "checkpoint.every=100", "log.to=[]", *rewards,
    ]  # fmt: skip


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Inside, the peaks of evaluations and steps are written down, in GiB."""
    peaks: dict[str, float] = {}
    before = {name: getattr(FineTuning, name) for name in ("step", "evaluate")}

    def watching(name: str) -> Any:
        def run(*args: Any) -> Any:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = before[name](*args)
            peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
            peaks[name] = max(peaks.get(name, 0.0), peak)
            return found

        return run

    for name in before:
        setattr(FineTuning, name, watching(name))
    try:
        yield peaks
    finally:
        for name, own in before.items():
            setattr(FineTuning, name, own)


def run(name: str, told: list[str], device: torch.device) -> dict[str, Any]:
    """A training. Returns its peaks, the seconds of its last step, and what it logged."""
    with watched(device) as peaks:
        directory = api.train(load_config(None, [*told, f"name={name}"]))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    logged = read_rows(directory / "metrics.jsonl")
    return {**peaks, "seconds": logged[-1]["seconds"], "rows": [{key: row[key] for key in KEYS} for row in logged]}


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of anything that two runs logged."""
    pairs = zip(one["rows"], other["rows"], strict=True)
    return max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-12) for a, b in pairs for key in KEYS)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints. Returns the numbers by model."""
    device, found = torch.device(options.device), {}
    quiet_libraries()
    work = Path(tempfile.mkdtemp(prefix="offload-"))
    try:
        reward = None if options.tiny else work / "reward"
        if reward:
            save_reward(reward, device)
        for name in options.only:
            if options.tiny:
                from tests.support.pipelines import save_pipeline

                save_pipeline({"sd15": "sd"}.get(name, name), work / name)
            else:
                save_model(name, work / name, device)
            told = overrides(work / name, reward, options, work / f"{name}-runs")
            runs = {label: run(label, [*told, f"model.offload={'true' if label == 'offload' else 'false'}"], device)
                    for label in ("without", "offload", "again")}  # fmt: skip
            shutil.rmtree(work / name)
            differences = {label: apart(runs["without"], runs[label]) for label in ("offload", "again")}
            found[name] = {**runs, "differences": differences}
            print(f"\n{SHAPES[name].label}, {options.size} pixels, micro-batches of {options.micro}\n")
            print(
                "| run | evaluation, peak GiB | step, peak GiB | step, s | largest difference |\n|---|---|---|---|---|"
            )
            for label, one in runs.items():
                told_of = f"{differences[label]:.1e}" if label in differences else "–"
                print(f"| {label} | {one['evaluate']:.2f} | {one['step']:.2f} | {one['seconds']:.2f} | {told_of} |")
            sys.stdout.flush()
            if options.json:
                Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(work)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda")
    made.add_argument("--only", nargs="+", default=["sd15", "sdxl"], choices=["sd15", "sdxl"])
    made.add_argument("--size", type=int, default=512, help="in pixels (default 512)")
    made.add_argument("--steps", type=int, default=4, help="sampling steps (default 4)")
    made.add_argument("--micro", type=int, default=1, help="images of a micro-batch (default 1)")
    made.add_argument("--tiny", action="store_true", help="tiny models, which show that the code runs")
    made.add_argument("--json", help="also write the numbers to this file")
    return made


if __name__ == "__main__":
    main(parser().parse_args())
