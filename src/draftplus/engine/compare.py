"""What `draftplus evaluate` does: the same prompts and seeds for several targets, measured alike, in one table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus import __version__
from draftplus.config import BASE_MODEL, RewardConfig, flatten, to_dict
from draftplus.data.prompts import load_prompts
from draftplus.distributed import pick_device
from draftplus.engine.build import (
    METRICS,
    MODELS,
    build_features,
    build_metric,
    build_model,
    build_reward,
    build_styles,
    is_reward,
    quiet_libraries,
)
from draftplus.engine.evaluate import Rewards, evaluation_prompts, score_images
from draftplus.engine.files import make_output, whole_directory, write_text
from draftplus.engine.generate import TUNED, Job, Knobs, decoded
from draftplus.engine.journal import finite
from draftplus.engine.latents import latents_of
from draftplus.engine.pictures import grid, picture_name, to_pil
from draftplus.engine.progress import Advance, progress
from draftplus.engine.step import SAMPLING_BATCH, chunks
from draftplus.engine.targets import Target, find_targets
from draftplus.errors import UserError
from draftplus.metrics.intervals import Estimate, mean_over_images, mean_over_pairs
from draftplus.metrics.lpips import pairwise_lpips
from draftplus.metrics.metric import Metric, Seen

BATCHED = "dissimilarity"  # its scores depend on what they are made together with
GRID = 16  # pictures in a row of the grid, and rows


@dataclass(frozen=True)
class Images:
    """What is made with every target: the images of a prompt next to one another, as many of each."""

    prompts: list[str]
    seeds: list[list[int]]

    @property
    def per_prompt(self) -> int:
        return len(self.seeds[0])

    @property
    def same_seeds(self) -> bool:
        return len(self.seeds) > 1 and all(one == self.seeds[0] for one in self.seeds)

    def jobs(self) -> list[Job]:
        return [Job(p, seed) for p, seeds in zip(self.prompts, self.seeds, strict=True) for seed in seeds]


@dataclass(frozen=True)
class Measured:
    """What was measured of a target. scores: by reward, one (n,) per prompt. seen: one per prompt."""

    scores: Mapping[str, list[Tensor]]
    seen: list[Seen]
    files: list[str]


@dataclass(frozen=True)
class Instruments:
    """What measures images. features, styles: None where no metric asks for them. described: each
    reward's settings, and whether it was trained on."""

    rewards: Rewards
    metrics: Mapping[str, Metric]
    features: Callable[[Tensor], Tensor] | None
    styles: Callable[[Tensor, str], Tensor] | None
    described: Mapping[str, dict[str, Any]]
    device: torch.device
    batch_size: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(metric.needs for metric in self.metrics.values()))


def compare(
    names: Sequence[str], overrides: Sequence[str], output: Path, prompts: Sequence[str] | None = None,
    images_per_prompt: int | None = None, seeds: Sequence[int] | None = None, rewards: Sequence[str] = (),
    metrics: Sequence[str] = (), features: str | None = None, knobs: Knobs = TUNED,
) -> dict[str, Any]:  # fmt: skip
    """Makes and measures images of every target, writes eval.json and pictures to `output`, and returns eval.json.

    What `api.evaluate` says of its arguments holds here.
    """
    targets = find_targets(names, overrides, knobs)
    which = _images(targets, prompts, images_per_prompt, seeds)
    quiet_libraries()
    make_output(output)
    tools = _instruments(targets, which, rewards, metrics, features)
    rows: list[dict[str, Any]] = []
    base: Measured | None = None
    targets.sort(key=lambda target: target.adapter is not None)  # the base model first: others are measured against it
    with progress("evaluating", len(targets) * len(which.jobs())) as advance:
        for number, target in enumerate(targets):
            measured = _measure(
                target, which, tools, base, output, _shifted(advance, number * len(which.jobs()), target)
            )
            base = base or measured
            rows.append(_row(target, which, tools, measured, base))
    told = {
        "draftplus": __version__,
        "prompts": which.prompts,
        "seeds": [job.seed for job in which.jobs()],
        "model": [flatten(to_dict(targets[0].config))[key] for key in BASE_MODEL],
        "sampler": asdict(targets[0].config.sampler),
        "rewards": tools.described,
        "features": (features or "emoji_clip") if tools.features is not None else None,
        "targets": rows,
    }
    write_text(output / "eval.json", json.dumps(finite(told), ensure_ascii=False, allow_nan=False, indent=1))
    return told


def _images(
    targets: Sequence[Target], prompts: Sequence[str] | None, images_per_prompt: int | None, seeds: Sequence[int] | None
) -> Images:
    """The prompts and seeds: as asked, else those of the first run's evaluation during training."""
    chosen = list(dict.fromkeys(prompts)) if prompts is not None else _held_out(targets)
    if not chosen:
        raise UserError("no prompt given; name a file that has some, or leave the prompts to the run")
    if images_per_prompt is not None and images_per_prompt < 1:
        raise UserError(f"--images-per-prompt is {images_per_prompt}; give at least 1")
    if seeds is not None:
        if images_per_prompt not in (None, len(seeds)):
            raise UserError(f"--images-per-prompt is {images_per_prompt}, but --seeds names {len(seeds)}; give one")
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError("--seeds: give one or more seeds, each once")
        return Images(chosen, [list(seeds)] * len(chosen))
    n = images_per_prompt or _first_run(targets).config.eval.images_per_prompt
    return Images(chosen, [list(range(number * n, number * n + n)) for number in range(len(chosen))])


def _first_run(targets: Sequence[Target]) -> Target:
    return next((target for target in targets if target.run is not None), targets[0])


def _held_out(targets: Sequence[Target]) -> list[str]:
    first = _first_run(targets)
    chosen = evaluation_prompts(first.config, load_prompts(first.config.data.prompts))
    for target in targets:
        if target.run is not None:
            others = evaluation_prompts(target.config, load_prompts(target.config.data.prompts))
            if others != chosen:
                raise UserError(
                    f"'{first.name}' and '{target.name}' evaluate on different held-out prompts; name one set with "
                    "--prompts"
                )
    return chosen


def _instruments(
    targets: Sequence[Target], which: Images, rewards: Sequence[str], metrics: Sequence[str], features: str | None
) -> Instruments:
    first = _first_run(targets)
    device = pick_device(first.config.device)
    embedded = first.config.model.path in MODELS
    known = _reward_configs([t for t in targets if t.run is not None or (embedded and t is first)])
    known.pop(BATCHED, None)
    for name in [*rewards, *metrics]:
        if name == BATCHED:
            raise UserError(f"'{name}' scores a training batch and not an image; measure diversity by --metric vendi")
    for name in rewards:
        if name in METRICS:
            raise UserError(f"--reward {name}: that is a metric; say --metric {name}")
    named = list(metrics) or ["lpips", *(["style_entropy", "style_divergence"] if embedded else [])]
    scorers = dict.fromkeys([*known, *rewards, *(name for name in named if name not in METRICS and is_reward(name))])
    chosen = {name: build_metric(name) for name in dict.fromkeys(named) if name not in scorers}
    for name, metric in chosen.items():
        if which.per_prompt < metric.least:
            raise UserError(
                f"metric '{name}' needs at least {metric.least} images of each prompt, got {which.per_prompt}: give "
                "more images per prompt, or name other metrics"
            )
    needs = frozenset().union(*(metric.needs for metric in chosen.values()))
    if features is not None and "features" not in needs:
        raise UserError(f"--features {features}: no metric here looks at features; add one, such as --metric vendi")
    return Instruments(
        {name: build_reward(name, known.get(name, RewardConfig()), device) for name in scorers},
        chosen,
        build_features(features, device) if "features" in needs else None,
        build_styles(device) if "styles" in needs else None,
        {
            name: {**asdict(known.get(name, RewardConfig())), "trained": any(name in t.config.reward for t in targets)}
            for name in scorers
        },
        device,
        first.config.train.sampling_batch_size or SAMPLING_BATCH,
    )


def _reward_configs(targets: Sequence[Target]) -> dict[str, RewardConfig]:
    """What the targets train and hold out, by name; their weights do not matter here."""
    known: dict[str, tuple[Target, RewardConfig]] = {}
    for target in targets:
        for name, config in {**target.config.reward, **target.config.eval.rewards}.items():
            scoring = {key: value for key, value in config.args.items() if key != "dropout"}  # which acts on gradients
            config = replace(config, args=scoring)
            first, other = known.setdefault(name, (target, config))
            if (config.path, config.args) != (other.path, other.args):
                raise UserError(
                    f"'{first.name}' and '{target.name}' have different settings of reward '{name}', so its scores "
                    "do not compare; evaluate each by itself"
                )
    return {name: config for name, (_, config) in known.items()}


def _shifted(advance: Advance, before: int, target: Target) -> Advance:
    def show(done: int, _: str) -> None:
        advance(before + done, target.label)

    return show


@torch.no_grad()
def _measure(
    target: Target, which: Images, tools: Instruments, base: Measured | None, output: Path, advance: Advance
) -> Measured:
    model = build_model(target.config.model, tools.device, trainable=False)
    if target.adapter is not None:
        model.load_adapter(target.adapter)
    latents = latents_of(
        model, which.jobs(), target.config.sampler, tools.batch_size, output / "latents" / target.hash[:16],
        target.knobs, advance,
    )  # fmt: skip
    scores: dict[str, list[Tensor]] = {name: [] for name in tools.rewards}
    seen, files, rows = [], [], []
    n = which.per_prompt
    with whole_directory(output / pictures_directory(target)) as building:
        for number, (prompt, seeds) in enumerate(zip(which.prompts, which.seeds, strict=True)):
            images = decoded(model, latents[number * n : (number + 1) * n], tools.batch_size)  # (n, 3, H, W)
            if tools.rewards:
                scored = score_images(tools.rewards, images, [prompt] * n, tools.device, tools.batch_size)
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
    return Measured(scores, seen, files)


def _see(images: Tensor, prompt: str, tools: Instruments, base: Seen | None) -> Seen:
    parts = list(chunks(len(images), tools.batch_size))
    features = torch.cat([tools.features(images[rows]) for rows in parts]) if tools.features else None
    styles = torch.cat([tools.styles(images[rows], prompt) for rows in parts]) if tools.styles else None
    distances = pairwise_lpips(images.to(tools.device)).cpu() if "distances" in tools.needs else None
    return Seen(distances, features, base.features if base else features, styles)


def pictures_directory(target: Target) -> Path:
    """Where a target's pictures go, below the output directory."""
    return Path("pictures") / re.sub(r"[^\w.@=,-]+", "-", target.label)


def _row(target: Target, which: Images, tools: Instruments, measured: Measured, base: Measured) -> dict[str, Any]:
    """The target's part of eval.json."""
    same = which.same_seeds
    estimates = {f"reward/{name}": mean_over_images(scores, same) for name, scores in measured.scores.items()}
    estimates |= {name: metric.estimate(measured.seen, same) for name, metric in tools.metrics.items()}
    numbers = {name: _numbers(estimate) for name, estimate in estimates.items()}
    if measured is not base:
        for name, change in _changes(measured, base, same).items():
            if name in numbers:
                numbers[name]["change"] = _numbers(change)
    jobs = which.jobs()
    return {
        "target": target.name,
        "label": target.label,
        "run": str(target.run) if target.run else None,
        "step": target.step,
        "lora_scale": target.knobs.lora_scale,
        "anneal": target.knobs.anneal,
        "hash": target.hash,
        "model_hash": target.model_hash,
        "adapter_hash": target.adapter_hash,
        "metrics": numbers,
        "per_prompt": {
            name: dict(zip(which.prompts, estimate.per_prompt, strict=True))
            for name, estimate in estimates.items()
            if estimate.per_prompt is not None
        },
        "per_image": {
            "prompt": [job.prompt for job in jobs],
            "seed": [job.seed for job in jobs],
            "file": measured.files,
            **{f"reward/{name}": torch.cat(scores).tolist() for name, scores in measured.scores.items()},
        },
        "pictures": str(pictures_directory(target)),
    }


def _numbers(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": estimate.mean,
        "standard_error": estimate.standard_error,
        "interval": list(estimate.interval) if estimate.interval else None,
        "images": estimate.images,
    }


def _changes(measured: Measured, base: Measured, same: bool) -> dict[str, Estimate]:
    """What changed from the base model, with the errors of the paired differences: the images share their noise."""

    def less(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        return [a.double() - b.double() for a, b in zip(first, second, strict=True)]

    changes = {
        f"reward/{name}": mean_over_images(less(scores, base.scores[name]), same)
        for name, scores in measured.scores.items()
    }
    ours, theirs = ([one.distances for one in which.seen if one.distances is not None] for which in (measured, base))
    if ours:
        changes["lpips"] = mean_over_pairs(less(ours, theirs), same)
    return changes
