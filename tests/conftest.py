"""What several tests share: a tiny model on disk, and no network."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # what tests trust is not what the user of this machine trusts
os.environ["DRAFTPLUS_CACHE"] = tempfile.mkdtemp()  # what tests embed is not what the user of this machine embedded

import torch

from draftplus.models.stable_diffusion import StableDiffusion
from tests.support.runs import save_small, small_settings
from tests.tiny import randomize, save_tiny, tiny_model

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    for name in ("XDG_STATE_HOME", "DRAFTPLUS_CACHE"):
        shutil.rmtree(os.environ[name], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion in the diffusers layout; read only."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def model(tiny_path: Path) -> StableDiffusion:
    """In float64, with LoRA on every layer and B away from zero."""
    made = tiny_model(tiny_path)
    randomize(made)
    return made


@pytest.fixture
def fresh(tiny_path: Path) -> StableDiffusion:
    """In float64, with LoRA on every layer as training starts: B is zero."""
    return tiny_model(tiny_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model; read only."""
    return save_small(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def settings(small: Path, tmp_path: Path) -> list[str]:
    """Settings of a short run below the test's own directory."""
    return small_settings(small, tmp_path)
