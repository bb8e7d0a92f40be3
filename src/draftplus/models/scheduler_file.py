"""The scheduler configuration of a model, read before any network is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftplus.config import Config, ModelConfig
from draftplus.diffusion.schedule import solver_of
from draftplus.errors import UserError
from draftplus.models.families import model_path

FILE = "scheduler/scheduler_config.json"


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
