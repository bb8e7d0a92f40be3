"""What `draftplus evaluate` does: several targets on the same prompts and seeds, measured alike, in one table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus import __version__
from draftplus.build import (
    build_model,
    quiet_libraries,
)
from draftplus.config import base_model_of, flatten, to_dict
from draftplus.distributed import World
from draftplus.evaluation.chunks import chunks
from draftplus.evaluation.embedding import embed_prompts
from draftplus.evaluation.generate import decoded
from draftplus.evaluation.images import Images, images_of
from draftplus.evaluation.instruments import Instruments, instruments_of
from draftplus.evaluation.knobs import TUNED, Knobs
from draftplus.evaluation.latents import absent_jobs, latents_of
from draftplus.evaluation.pictures import grid, picture_name, to_pil
from draftplus.evaluation.scores import score_images
from draftplus.evaluation.targets import Target, find_targets
from draftplus.metrics.intervals import Estimate, mean_over_images, paired_gain, paired_gain_over_pairs
from draftplus.metrics.lpips import pairwise_lpips
from draftplus.metrics.metric import Seen
from draftplus.progress import Advance, progress
from draftplus.rewards.offloaded import offloaded
from draftplus.runs.files import output_held, whole_directory, write_text
from draftplus.runs.journal import finite
from draftplus.runs.rows import MetricRow, TargetRow, reward_key
from draftplus.types import Model

GRID = 16  # pictures in a row of the grid, and rows


@dataclass(frozen=True)
class Measured:
    """What was measured for a target. scores: by reward, one (n,) per prompt. seen: one per prompt. gate: as in
    `TargetRow`."""

    scores: Mapping[str, list[Tensor]]
    seen: list[Seen]
    files: list[str]
    gate: float


def compare(
    names: Sequence[str], overrides: Sequence[str], output: Path, prompts: Sequence[str] | None = None,
    images_per_prompt: int | None = None, seeds: Sequence[int] | None = None, rewards: Sequence[str] = (),
    metrics: Sequence[str] = (), features: str | None = None, knobs: Knobs = TUNED, latents: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Makes and measures images of every target, writes eval.json and pictures to `output`, and returns eval.json.

    The arguments are those of `api.evaluate`.
    """
    targets = find_targets(names, overrides, knobs)
    which = images_of(targets, prompts, images_per_prompt, seeds)
    quiet_libraries()
    with output_held(output):
        return _compare(targets, which, output, rewards, metrics, features, latents or output / "latents")


def _compare(
    targets: list[Target], which: Images, output: Path, rewards: Sequence[str], metrics: Sequence[str],
    features: str | None, latents: Path,
) -> dict[str, Any]:  # fmt: skip
    with progress("loading the rewards and metrics", None):
        tools = instruments_of(targets, which, rewards, metrics, features)
    rows: list[dict[str, Any]] = []
    base: Measured | None = None
    targets.sort(key=lambda target: target.adapter is not None)  # the base model first: others are measured against it
    ready = [_embedded(targets, which, tools, latents)]
    with progress("evaluating", len(targets) * len(which.jobs()), unit="images") as advance:
        for number, target in enumerate(targets):
            show = _shifted(advance, number * len(which.jobs()), target)
            model = ready.pop() if ready else _build(target, tools)
            measured = _measure(model, target, which, tools, base, output, latents, show)
            del model  # before the next one is loaded
            base = base or measured
            rows.append(_row(target, which, tools, measured, base).row())
    told = {
        "draftplus": __version__,
        "prompts": which.prompts,
        "seeds": [job.seed for job in which.jobs()],
        "model": base_model_of(flatten(to_dict(targets[0].config))),
        "sampler": asdict(targets[0].config.sampler),
        "rewards": tools.described,
        "features": (features or "emoji_clip") if tools.features is not None else None,
        "targets": rows,
    }
    write_text(output / "eval.json", json.dumps(finite(told), ensure_ascii=False, allow_nan=False, indent=1))
    return told


def _shifted(advance: Advance, before: int, target: Target) -> Advance:
    def show(done: int, _: str) -> None:
        advance(before + done, target.label)

    return show


def _build(target: Target, tools: Instruments) -> Model:
    return build_model(target.config.model, tools.device, trainable=False)


def _embedded(targets: Sequence[Target], which: Images, tools: Instruments, latents: Path) -> Model:
    """The first target's model, once the prompts are embedded for all, whose text encoders are the same.

    Left out are prompts that every target has the latents of.
    """
    with progress("loading the model", None):
        model = _build(targets[0], tools)
    absent = [job for target in targets for job in absent_jobs(which.jobs(), latents_directory(latents, target))]
    if absent:
        negative = targets[0].config.sampler.negative_prompt
        embed_prompts(model, [*(job.prompt for job in absent), negative], World(0, 1, model.device))
    return model


def latents_directory(latents: Path, target: Target) -> Path:
    """Where a target's latents are kept, among those of others."""
    return latents / target.hash[:16]


@torch.no_grad()
def _measure(
    model: Model, target: Target, which: Images, tools: Instruments, base: Measured | None, output: Path, made: Path,
    advance: Advance,
) -> Measured:  # fmt: skip
    if target.adapter is not None:
        model.tuned.load(target.adapter)
    rewards = offloaded(tools.rewards, model.offload)
    latents = latents_of(
        model, which.jobs(), target.config.sampler, tools.batch_size,
        latents_directory(made, target), target.knobs, advance,
    )  # fmt: skip
    scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
    seen, files, rows = [], [], []
    n = which.per_prompt
    with whole_directory(output / pictures_directory(target)) as building:
        for number, (prompt, seeds) in enumerate(zip(which.prompts, which.seeds, strict=True)):
            images = decoded(model, latents[number * n : (number + 1) * n], tools.batch_size)  # (n, 3, H, W)
            if rewards:
                scored = score_images(rewards, images, [prompt] * n, tools.device, tools.batch_size)
                for name, values in scored.items():
                    scores[name].append(values)
            seen.append(_see(images, prompt, tools, base.seen[number] if base else None))
            pictures = [to_pil(image) for image in images]
            names = [picture_name(number, prompt, seed) for seed in seeds]
            for name, picture in zip(names, pictures, strict=True):
                picture.save(building / name)
            files += names
            if number < GRID:
                rows.append(pictures[:GRID])
        grid(rows).save(building / "grid.png")
    return Measured(scores, seen, files, 0.0 if target.knobs.anneal is not None else model.tuned.gate)


def _see(images: Tensor, prompt: str, tools: Instruments, base: Seen | None) -> Seen:
    parts = list(chunks(len(images), tools.batch_size))
    features = torch.cat([tools.features(images[rows]) for rows in parts]) if tools.features else None
    styles = torch.cat([tools.styles(images[rows], prompt) for rows in parts]) if tools.styles else None
    distances = pairwise_lpips(images.to(tools.device)).cpu() if "distances" in tools.needs else None
    return Seen(distances, features, base.features if base else features, styles)


def pictures_directory(target: Target) -> Path:
    """Where a target's pictures go, below the output directory."""
    return Path("pictures") / re.sub(r"[^\w.@=,-]+", "-", target.label)


def _row(target: Target, which: Images, tools: Instruments, measured: Measured, base: Measured) -> TargetRow:
    """The target's part of eval.json."""
    same = which.same_seeds
    estimates = {reward_key(name): mean_over_images(scores, same) for name, scores in measured.scores.items()}
    estimates |= {name: metric.estimate(measured.seen, same) for name, metric in tools.metrics.items()}
    changes = _changes(measured, base, same) if measured is not base else {}
    jobs = which.jobs()
    return TargetRow(
        target=target.name,
        label=target.label,
        run=str(target.run) if target.run else None,
        step=target.step,
        lora_scale=target.knobs.lora_scale,
        anneal=target.knobs.anneal,
        gate=measured.gate,
        hash=target.hash,
        model_hash=target.model_hash,
        adapter_hash=target.adapter_hash,
        metrics={name: _metric(estimate, changes.get(name)) for name, estimate in estimates.items()},
        per_prompt={
            name: dict(zip(which.prompts, estimate.per_prompt, strict=True))
            for name, estimate in estimates.items()
            if estimate.per_prompt is not None
        },
        per_image={
            "prompt": [job.prompt for job in jobs],
            "seed": [job.seed for job in jobs],
            "file": measured.files,
            **{reward_key(name): torch.cat(scores).tolist() for name, scores in measured.scores.items()},
        },
        pictures=str(pictures_directory(target)),
    )


def _metric(estimate: Estimate, change: Estimate | None = None) -> MetricRow:
    return MetricRow(
        estimate.mean, estimate.standard_error, estimate.interval, estimate.images,
        None if change is None else _metric(change),
    )  # fmt: skip


def _changes(measured: Measured, base: Measured, same: bool) -> dict[str, Estimate]:
    """The changes from the base model for all that has a paired gain: the images share their noise."""
    changes = {
        reward_key(name): paired_gain(scores, base.scores[name], same) for name, scores in measured.scores.items()
    }
    ours, theirs = ([one.distances for one in which.seen if one.distances is not None] for which in (measured, base))
    if ours:
        changes["lpips"] = paired_gain_over_pairs(ours, theirs, same)
    return changes
