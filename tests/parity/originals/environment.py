"""Runs a script with an original package in an environment made for it and thrown away afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run_apart(script: str, packages: Sequence[str], alone: Sequence[str]) -> None:
    """packages: what pip installs first, with what they need. alone: then, without. On Linux pip takes PyTorch's CUDA
    build unless it finds a local wheel of the CPU build (PIP_FIND_LINKS), which is enough.
    """
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = str(Path(directory) / "bin" / "python")
        for extra, wanted in (([], packages), (["--no-deps"], alone)):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *extra, *wanted], check=True)
        subprocess.run([python, script, "--inside"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def inside() -> bool:
    return "--inside" in sys.argv
