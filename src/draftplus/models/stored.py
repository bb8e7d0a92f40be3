"""In which precision a base model's files hold its denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from draftplus.config import ModelConfig
from draftplus.models.families import model_path
from draftplus.models.loading import is_single_file
from draftplus.models.weights import read_state_dict

PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DENOISER = ("model.diffusion_model.", "unet.", "")  # how its names begin in files of the whole model, and of it alone


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """The precision of the stored denoiser; None where the files are not at hand or do not tell."""
    path = Path(config.denoiser or model_path(config)).expanduser()
    if not config.denoiser and not path.exists():
        path = _cached(config)
    if path.is_dir() and not config.denoiser:
        path = path / "unet"
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files or not (path.is_dir() or is_single_file(str(path)) or config.denoiser):
        return None
    wanted = [file for file in files if _variant(file) == config.variant]
    return _dtype_of((wanted or files)[0])


def _variant(file: Path) -> str | None:
    """Such as fp16, of diffusion_pytorch_model.fp16.safetensors."""
    parts = file.name.split(".")
    return parts[1].partition("-")[0] if len(parts) > 2 else None


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
    for prefix in DENOISER:
        found = next((kind for name, kind in kinds.items() if name.startswith(prefix)), None)
        if found is not None:
            return found
    return None
