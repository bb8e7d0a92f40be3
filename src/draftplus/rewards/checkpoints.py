"""Frozen networks from transformers checkpoints, local or on the hub; one that cannot be loaded is a UserError."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from draftplus.errors import UserError
from draftplus.hub import why_offline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(path: str | Path) -> str:
    """A directory that exists, or something that can be a hub id ("owner/name"). UserError for anything else."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.exists():
        raise UserError(
            f"reward weights '{path}': this is a file; give the directory that contains it and its config.json."
        )
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"reward weights '{path}': no such directory; correct the path or give a hub id.")
    return str(path)


def lacks(path: str, name: str) -> str:
    """The words for a file that a checkpoint lacks; offline, a hub id has only what was downloaded before."""
    return f"'{path}' has no {name}" + ("" if Path(path).is_dir() else " on the hub or in the local cache")


def has_file(path: str, name: str, revision: str | None = None) -> bool:
    """Whether a checkpoint has a file. UserError where there is no such checkpoint, or the hub cannot be reached."""
    return _file(path, name, revision) is not None


def read_json(path: str, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None where it has no such file. UserError where it cannot be read."""
    file = _file(path, name, revision)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{file}' is not valid JSON ({error}): download the checkpoint again.") from error


def _file(path: str, name: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    offline = None if Path(path).is_dir() else why_offline()
    try:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(
            f"reward weights '{path}' were found neither on this disk nor on the hub: {offline or first(error)}"
        ) from error


def load_frozen(
    model_class: Any, path: str, model_type: str, revision: str | None, device: Any, dtype: torch.dtype | None
) -> Any:
    """A transformers model of `model_class` in eval mode, without gradient on its weights.

    dtype: of the weights, float32 unless given, whatever they are stored in. Weights are safetensors, or a pickle that
    torch reads with weights_only. UserError for another architecture, missing or broken weights, or pickled code.
    """
    config = read_json(path, "config.json", revision)
    if config is None:
        raise UserError(f"{lacks(path, 'config.json')}: give a transformers checkpoint of a {model_type} model.")
    if config.get("model_type") != model_type:
        raise UserError(
            f"'{path}' contains a {config.get('model_type')} model, but this reward needs a {model_type} model."
        )
    from safetensors import SafetensorError

    try:
        model, report = model_class.from_pretrained(
            path, revision=revision, dtype=dtype or torch.float32, output_loading_info=True
        )
    except UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it calls {culprit[1]}" if culprit else "it is not a plain pickle of tensors"
        raise UserError(
            f"the pickled weights in '{path}' are rejected, because loading them could run code ({reason}).\n"
            "Use safetensors, or a file that torch.load can read with weights_only=True."
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"the weights in '{path}' cannot be loaded: {first(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"the weights in '{path}' are incomplete: {len(missing)} tensors are missing, for example {missing[0]}."
        )
    return model.to(device).eval().requires_grad_(False)


def first(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
