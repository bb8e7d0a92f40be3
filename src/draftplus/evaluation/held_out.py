"""Evaluation during training: held-out prompts with fixed seeds, scored by every reward, with their diversity."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.config import Config
from draftplus.distributed import World
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.evaluation.generate import generate_images
from draftplus.evaluation.held_out_set import EvaluationSet
from draftplus.evaluation.knobs import TUNED, Job, Knobs
from draftplus.evaluation.pictures import save_pictures
from draftplus.evaluation.scores import Rewards, score_images
from draftplus.metrics.lpips import lpips_per_prompt
from draftplus.progress import Advance
from draftplus.runs.directory import step_name
from draftplus.runs.files import whole_directory, write_text
from draftplus.runs.rows import HeldOut, evaluation_row
from draftplus.types import Model

Total = Callable[[Mapping[str, float]], float]


def evaluate_held_out(
    model: Model, rewards: Rewards, total: Total, which: EvaluationSet, config: Config, step: int, run: Path,
    world: World, advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    """Makes, scores and saves the evaluation images of a step. Returns the row of eval.jsonl, the same on all ranks.

    The pictures go to `run`/samples/step-…; scores are computed on the images before they are rounded to 8 bits.
    """
    pictures = run / "samples" / step_name(step)
    row = evaluation_row(step, measure(model, rewards, total, which, config, pictures, world, advance))
    if world.is_main:
        write_text(run / "samples" / "prompts.json", json.dumps(which.prompts, ensure_ascii=False, indent=1))
    return row


@torch.no_grad()
def measure(
    model: Model, rewards: Rewards, total: Total, which: EvaluationSet, config: Config, pictures: Path, world: World,
    advance: Advance, knobs: Knobs = TUNED,
) -> HeldOut:  # fmt: skip
    """Makes the images of the evaluation set and saves them to `pictures`. Returns their record in eval.jsonl.

    total: the sum that is optimised, of the rewards' means by name.
    """
    began = time.perf_counter()
    jobs, padding = which.jobs(world.rank, world.size), which.padding(world.rank, world.size)
    size, decode = config.train.sampling_batch_size or SAMPLING_BATCH, config.train.micro_batch_size
    images = generate_images(model, [*jobs, *padding], config.sampler, size, decode, knobs, advance)
    mine = _measure(images[: len(jobs)], jobs, rewards, model.device, decode) if jobs else []
    thrown_away, asked = images[len(jobs) :][:decode], [job.prompt for job in padding[:decode]]
    for _ in range(math.ceil(len(images) / decode) - math.ceil(len(jobs) / decode)):
        score_images(rewards, thrown_away, asked, model.device, decode)
    results = sorted((result for part in world.gather(mine) for result in part), key=lambda result: result.seed)
    if world.is_main:
        _save(pictures, results)
    per_image = {name: [result.scores[name] for result in results] for name in rewards}
    means = {name: sum(scores) / len(scores) for name, scores in per_image.items()}
    lpips = {result.prompt: result.lpips for result in results}
    return HeldOut(
        reward=total(means),
        rewards=means,
        lpips=sum(lpips.values()) / len(lpips),
        images=len(results),
        seconds=round(time.perf_counter() - began, 3),
        per_image=per_image,
        lpips_per_prompt=lpips,
    )


@dataclass(frozen=True)
class _Result:
    """One evaluated image: 8-bit pixels (3, H, W), its scores, and its prompt's mean pairwise LPIPS."""

    prompt: str
    seed: int
    pixels: Tensor
    scores: dict[str, float]
    lpips: float


def _measure(images: Tensor, jobs: list[Job], rewards: Rewards, device: torch.device, size: int) -> list[_Result]:
    prompts = [job.prompt for job in jobs]
    scores = {name: values.tolist() for name, values in score_images(rewards, images, prompts, device, size).items()}
    lpips = lpips_per_prompt(images.to(device), prompts)
    pixels = (images * 255).round().byte()
    return [
        _Result(job.prompt, job.seed, pixels[i].clone(), {name: scores[name][i] for name in rewards}, lpips[job.prompt])
        for i, job in enumerate(jobs)
    ]


def _save(pictures: Path, results: list[_Result]) -> None:
    images = torch.stack([result.pixels for result in results]).float() / 255
    with whole_directory(pictures) as target:
        save_pictures(images, [result.prompt for result in results], [result.seed for result in results], target)
