"""Tiny pipelines of every family, each saved once, and runs of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from draftplus.config import Config
from draftplus.planning.measure import Memory, measure
from draftplus.planning.subject import subject
from draftplus.runs.plan import plan_run
from tests.support.pipelines import save_pipeline

# name of a tiny pipeline -> pixels of a side
FAMILIES = {"sd": 16, "sdxl": 64, "sd3": 64, "flux_dev": 64, "chroma": 64, "flux2_klein_base": 64, "qwen_image": 64,
            "zimage": 64}  # fmt: skip
PROMPT = "a cat on a mat"
IMAGES = 2

Configured = Callable[..., Config]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_pipeline(name, tmp_path_factory.mktemp("planned") / name)
        return made[name]

    return directory


@pytest.fixture
def configured(saved: Callable[[str], Path]) -> Configured:
    """A run of two images, of the pipeline of a name, with further settings."""

    def made(name: str, *more: str) -> Config:
        size = FAMILIES[name]
        settings = [
            f"model.path={saved(name)}", "device=cpu", "sampler.steps=3", f"sampler.height={size}",
            f"sampler.width={size}", "objective.kl_coeff=0.1", f"train.global_batch_size={IMAGES}",
            f"train.micro_batch_size={IMAGES}",
        ]  # fmt: skip
        return plan_run("emoji", [*settings, *more])[0]

    return made


def planned(config: Config) -> Memory:
    return measure(subject(config), IMAGES, IMAGES, PROMPT)
