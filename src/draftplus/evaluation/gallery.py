"""What `draftplus generate` does: images from one model, their scores, and files with both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from draftplus.build import build_model, build_reward, quiet_libraries
from draftplus.config import RewardConfig
from draftplus.distributed import World, pick_device
from draftplus.errors import UserError
from draftplus.evaluation.chunks import SAMPLING_BATCH
from draftplus.evaluation.embedding import embed_prompts
from draftplus.evaluation.generate import generate_images
from draftplus.evaluation.knobs import TUNED, Job, Knobs, jobs_of
from draftplus.evaluation.pictures import save_pictures
from draftplus.evaluation.scores import score_images
from draftplus.progress import progress
from draftplus.rewards.offloaded import offloaded
from draftplus.runs.files import disk_errors, output_held, write_text
from draftplus.runs.journal import finite
from draftplus.runs.rows import reward_key
from draftplus.runs.weights import find_weights, intact


@dataclass(frozen=True)
class Gallery:
    """Images (n, 3, H, W) in [0, 1] of n jobs, and each reward's scores of them, (n,)."""

    jobs: list[Job]
    images: Tensor
    scores: dict[str, Tensor]

    def save(self, directory: Path) -> list[dict[str, Any]]:
        """Writes the pictures, grid.png and images.jsonl to a directory. Returns the rows of the latter."""
        prompts, seeds = [job.prompt for job in self.jobs], [job.seed for job in self.jobs]
        paths = save_pictures(self.images, prompts, seeds, directory)
        scores = {reward_key(name): values.tolist() for name, values in self.scores.items()}
        rows = [
            {"file": path.name, "prompt": job.prompt, "seed": job.seed, **{key: scores[key][i] for key in scores}}
            for i, (path, job) in enumerate(zip(paths, self.jobs, strict=True))
        ]
        lines = [json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        write_text(directory / "images.jsonl", "".join(lines))
        for name, values in self.scores.items():
            bad = [job for job, score in zip(self.jobs, values, strict=True) if not score.isfinite()]
            if bad:
                raise UserError(
                    f"reward '{name}' is not finite for {len(bad)} of {len(rows)} images, such as '{bad[0].prompt}' "
                    f"with seed {bad[0].seed}; check what it returns for images in [0, 1].\n"
                    f"The pictures are in {directory}"
                )
        return rows


def make_gallery(
    target: str, prompts: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = (),
    adapter: Path | None = None, knobs: Knobs = TUNED, rewards: Sequence[str] = (),
) -> Gallery:  # fmt: skip
    """Makes and scores the images of every prompt with every seed, a prompt's images next to one another.

    target: a model, RUN, RUN@step or RUN@best. adapter: trained weights in place of the run's own. rewards: by name,
    with the settings of the run where it has them.

    Raises UserError for a user's mistake, before any image is made.
    """
    if "" in (prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; describe a picture, such as 'a cat'")
    weights = find_weights(target, overrides, code=rewards)
    if adapter is not None and not adapter.exists():
        raise UserError(f"--adapter '{adapter}': no such file or directory")
    config = weights.config
    quiet_libraries()
    device = pick_device(config.device)
    known = {**config.reward, **config.eval.rewards}
    scorers = {name: build_reward(name, known.get(name, RewardConfig()), device) for name in rewards}
    with progress("loading the model", None):
        model = build_model(config.model, device, trainable=False)
    scorers = offloaded(scorers, model.offload)
    embed_prompts(model, [*prompts, config.sampler.negative_prompt], World(0, 1, device))
    chosen = intact(adapter) if adapter is not None else weights.adapter
    if chosen is None and knobs != TUNED:
        raise UserError(f"'{target}' has no trained weights to scale or anneal; name a run or give an adapter")
    if chosen is not None:
        model.tuned.load(chosen)
    knobs.check()
    jobs = jobs_of(prompts, seeds)
    size = config.train.sampling_batch_size or SAMPLING_BATCH
    with progress("generating", len(jobs), unit="images") as advance:
        images = generate_images(model, jobs, config.sampler, size, knobs=knobs, advance=advance)
        scores = score_images(scorers, images, [job.prompt for job in jobs], device)
    return Gallery(jobs, images, scores)


def write_gallery(
    output: Path, target: str, prompts: Sequence[str], seeds: Sequence[int], overrides: Sequence[str] = (),
    adapter: Path | None = None, knobs: Knobs = TUNED, rewards: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """`make_gallery`, its files in `output`. Returns the rows of images.jsonl.

    Raises UserError, before any image is made, also if `output` cannot be written.
    """
    with output_held(output):
        gallery = make_gallery(target, prompts, seeds, overrides, adapter, knobs, rewards)
        with disk_errors(output):
            return gallery.save(output)
