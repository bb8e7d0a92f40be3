"""The latents of finished images, on disk: an interrupted evaluation continues, and no image is made twice.

A picture file would round images to 8 bits, and change every score. Latents in float32 are what the decoder was given,
so the images come back bit for bit, at a fiftieth of the images' size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus.config import SamplerConfig
from draftplus.errors import UserError
from draftplus.evaluation.generate import sampled_latents
from draftplus.evaluation.knobs import TUNED, Job, Knobs
from draftplus.progress import Advance
from draftplus.runs.files import disk_errors
from draftplus.types import Model


def latents_of(
    model: Model, jobs: Sequence[Job], sampler: SamplerConfig, batch_size: int, directory: Path, knobs: Knobs = TUNED,
    advance: Advance | None = None,
) -> Tensor:  # fmt: skip
    """The final latents of all jobs, (n, c, h, w) float32 on the CPU; those in `directory` are not made again.

    directory: of one model with its adapter, settings and knobs. Every batch is written there once it is made.

    Raises UserError if a file there is damaged, or the disk is full.
    """
    known = _read(directory)
    absent = [job for job in dict.fromkeys(jobs) if job not in known]
    done = len(jobs) - len(absent)
    if advance:
        advance(done, "")
    if absent:
        for rows, latents in sampled_latents(model, absent, sampler, batch_size, knobs):
            batch = dict(zip(absent[rows], latents.float().cpu(), strict=True))
            _write(directory, batch)
            known.update(batch)
            if advance:
                advance(done + rows.stop, "")
    return torch.stack([known[job] for job in jobs])


def absent_jobs(jobs: Sequence[Job], directory: Path) -> list[Job]:
    """The jobs whose latents are not in `directory`; a damaged file is for `latents_of` to refuse."""
    there: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
            there.update(opened.keys())
    return [job for job in jobs if _name(job) not in there]


def _name(job: Job) -> str:
    return f"{job.seed} {job.prompt}"


def _read(directory: Path) -> dict[Job, Tensor]:
    found: dict[Job, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            tensors = load_file(file)
            for name, tensor in tensors.items():
                seed, _, prompt = name.partition(" ")
                found[Job(prompt, int(seed))] = tensor
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{file}: damaged ({error}); remove it to generate its images again") from None
    return found


def _write(directory: Path, batch: dict[Job, Tensor]) -> None:
    numbers = [int(file.stem) for file in directory.glob("*.safetensors") if file.stem.isdigit()]
    target = directory / f"{max(numbers, default=-1) + 1:06d}.safetensors"
    building = target.with_name(f".{target.name}.{os.getpid()}.building")  # two evaluations may share a base model
    with disk_errors(target):
        directory.mkdir(parents=True, exist_ok=True)
        save_file({_name(job): latents.contiguous() for job, latents in batch.items()}, building)
        building.replace(target)
