"""In which files a base model's denoiser is stored, and in which precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from draftplus.config import ModelConfig
from draftplus.models.families import model_path
from draftplus.models.files import choose, forms, loaded_from, names_in
from draftplus.models.kind import DENOISERS
from draftplus.weights import read_state_dict

PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = ("model.diffusion_model.", "unet.", "")  # how its names begin in files of the whole model, and of it alone


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """The precision of the stored denoiser; None where the files are not at hand or do not tell."""
    path = _place(config)
    files = loaded_from(path, True, config.variant) if path.is_dir() else [path] if path.is_file() else []
    return _dtype_of(files[0]) if files else None


def loaded_variant(config: ModelConfig) -> str | None:
    """The variant of the denoiser's files: that of `model.variant`, or the only one; None: plain files."""
    path = _place(replace(config, denoiser=None))
    stored = choose(forms(names_in(path), True), config.variant, str(path))
    return stored.variant if stored else None


def _place(config: ModelConfig) -> Path:
    """The folder of the denoiser's weights, or the file that holds them."""
    path = Path(config.denoiser or model_path(config)).expanduser()
    if config.denoiser:
        return path
    path = path if path.exists() else _cached(config)
    return next((path / name for name in DENOISERS if (path / name).is_dir()), path)


def _cached(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.path, revision=config.revision, local_files_only=True))
    except Exception:  # the hub's errors have no base class in common
        return Path(config.path)


def _dtype_of(file: Path) -> torch.dtype | None:
    if file.suffix != ".safetensors":
        kinds = {name: tensor.dtype for name, tensor in read_state_dict(file).items() if tensor.is_floating_point()}
    else:
        try:
            with safe_open(file, framework="pt") as opened:
                told = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        kinds = {name: PRECISIONS[kind] for name, kind in told.items() if kind in PRECISIONS}
    for prefix in NAMES:
        found = next((kind for name, kind in kinds.items() if name.startswith(prefix)), None)
        if found is not None:
            return found
    return None
