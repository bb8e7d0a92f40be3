"""The scheduler of a model: its configuration, read before any network is, and stock diffusers' class for a solver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftplus.config import Config, ModelConfig, SamplerConfig
from draftplus.diffusion.schedule import is_flow, solver_of
from draftplus.errors import UserError
from draftplus.models.families import model_path

FILE = "scheduler/scheduler_config.json"

# solver -> the scheduler of stock diffusers, what it must be told, and what other programs call it
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "DDIM"),
    "euler": ("EulerDiscreteScheduler", {}, "Euler"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
}


def scheduler_config(config: ModelConfig) -> Mapping[str, Any]:
    """A model's scheduler_config.json, of a hub model that of its cache; {} where none is on this disk."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = config.config or model_path(config)  # a single file's is that of the directory of its configurations
        file = Path(path).expanduser() / FILE
        if not file.is_file():
            file = Path(str(try_to_load_from_cache(path, FILE, revision=config.revision)))
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError):  # a path that can be no hub id among them
        return {}
    return told if isinstance(told, dict) else {}


def sampled_with(config: Config) -> str:
    """The name of the solver that a configuration samples with, as far as its model is at hand."""
    return solver_of(scheduler_config(config.model), config.sampler.solver)


def stock_scheduler(file: Mapping[str, Any], solver: str, spacing: str | None) -> Any:
    """The scheduler of stock diffusers that takes a solver's steps. file: the model's scheduler configuration."""
    import diffusers

    if is_flow(file):
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(file))
    name, changes, _ = SCHEDULERS[solver]
    return getattr(diffusers, name).from_config(
        dict(file), **changes, **({"timestep_spacing": spacing} if spacing else {})
    )


def differs_from_stock(file: Mapping[str, Any], sampler: SamplerConfig) -> bool:
    """Whether it samples with DDIM and linspace spacing, whose noise levels are others than in stock diffusers."""
    return solver_of(file, sampler.solver) == "ddim" and (sampler.spacing or file.get("timestep_spacing")) == "linspace"
