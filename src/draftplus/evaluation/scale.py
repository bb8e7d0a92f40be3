"""The mean and deviation of rewards over the base model's pictures, by which `reward.NAME.normalise: base` scales."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from draftplus import rng
from draftplus.config import Config
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.evaluation.generate import generate_images
from draftplus.evaluation.knobs import Job, Knobs
from draftplus.evaluation.scores import Rewards, score_images
from draftplus.progress import progress
from draftplus.rewards.combined import Scale
from draftplus.runs.directory import SCALES
from draftplus.runs.files import write_text
from draftplus.types import Model

PICTURES = 64  # of which a deviation is known to 9%
ROUNDING = 1e-6  # of the values: what differs by less does so by the rounding of float32


def normalised(config: Config) -> list[str]:
    """The rewards that are scaled in the sum."""
    return [name for name, one in config.reward.items() if one.normalise is not None]


def base_jobs(config: Config, prompts: Sequence[str]) -> list[Job]:
    """The pictures that rewards are measured on, none where no reward is normalised: evenly spaced training prompts.

    Their noise is the same whatever the run's seed is, so that runs of several seeds optimise one and the same sum.
    """
    if not normalised(config):
        return []
    chosen = [prompts[i * len(prompts) // PICTURES] for i in range(PICTURES)]
    return [Job(prompt, rng.address(0, "normalise", index=i)) for i, prompt in enumerate(chosen)]


def read_scales(run: Path, config: Config) -> dict[str, Scale] | None:
    """The scales that a run has measured; None where a reward's is not there.

    Raises UserError for a damaged file.
    """
    path = run / SCALES
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["rewards"]
        found = {name: Scale(float(one["mean"]), float(one["deviation"])) for name, one in told.items()}
        if not all(math.isfinite(one.mean) and 0 < one.deviation < math.inf for one in found.values()):
            raise ValueError("a deviation that is not above 0")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is measured again") from None
    return {name: found[name] for name in normalised(config)} if found.keys() >= {*normalised(config)} else None


def measured_scales(
    model: Model, rewards: Rewards, config: Config, jobs: Sequence[Job], here: World
) -> dict[str, Scale]:
    """Makes the pictures of `base_jobs` by the base model, shared among the processes, and measures each reward.

    Returns the same on all of them. Raises UserError for a reward that is not finite, or does not vary.
    """
    chosen = {name: rewards[name] for name in normalised(config)}
    rounds = math.ceil(len(jobs) / here.size)  # of each process as many, so that none waits for a pass of another
    mine = [index % len(jobs) for index in range(here.rank, rounds * here.size, here.size)]
    size, decode = config.train.sampling_batch_size or SAMPLING_BATCH, config.train.micro_batch_size
    with progress("measuring the rewards' scale", len(mine), here.is_main, "pictures") as advance:
        own = [jobs[index] for index in mine]
        images = generate_images(model, own, config.sampler, size, decode, Knobs(anneal="base"), advance)
        scores = score_images(chosen, images, [job.prompt for job in own], model.device, decode)
    parts = here.gather({name: dict(zip(mine, values.tolist(), strict=True)) for name, values in scores.items()})
    found: dict[str, Scale] = {}
    for name in chosen:
        together = {index: score for part in parts for index, score in part[name].items()}
        found[name] = _scale(name, [together[index] for index in sorted(together)])
    return found


def _scale(name: str, scores: Sequence[float]) -> Scale:
    where = f"reward.{name}.normalise is base, but for {len(scores)} pictures of the base model this reward"
    if not all(map(math.isfinite, scores)):
        raise UserError(f"{where} is not always finite; check what it returns for images in [0, 1]")
    mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
    if deviation <= ROUNDING * max(map(abs, scores)):
        raise UserError(
            f"{where} is always {mean:.6g}, so there is nothing to scale it by; remove normalise, or "
            "choose a reward that tells these pictures apart"
        )
    return Scale(mean, deviation)


def write_scales(run: Path, scales: Mapping[str, Scale]) -> None:
    """Keeps the scales in a run, for when it is continued; none: removes those of an earlier start."""
    if not scales:
        (run / SCALES).unlink(missing_ok=True)
        return
    told = {name: scale._asdict() for name, scale in scales.items()}
    write_text(run / SCALES, json.dumps({"pictures": PICTURES, "rewards": told}, indent=1) + "\n")
