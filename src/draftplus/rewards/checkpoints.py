"""Frozen networks from transformers checkpoints or single files of weights, local or on the hub.

What cannot be loaded is a UserError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.errors import UserError
from draftplus.hub import by_hand, why_offline
from draftplus.weights import read_state_dict

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
PROCESSOR = "tokenizer.json tokenizer_config.json preprocessor_config.json"  # the small files of a checkpoint
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def locate(path: str | Path) -> str:
    """A directory that exists, or something that can be a hub id ("owner/name"). UserError for anything else."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    refuse_nemo(path)
    if local.exists():
        raise UserError(
            f"reward weights '{path}': this is a file; give the directory that contains it and its config.json."
        )
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"reward weights '{path}': no such directory; correct the path or give a hub id.")
    return str(path)


def refuse_nemo(path: str | Path) -> None:
    """UserError for a file of NeMo's, which names what converts it."""
    if Path(path).suffix == ".nemo" and not Path(path).expanduser().is_dir():
        raise UserError(
            f"reward weights '{path}': a .nemo file is converted first; "
            f"run: draftplus reward convert {path} -o DIRECTORY, then give the directory as reward.clip.path."
        )


def lacks(path: str, name: str) -> str:
    """The words for a file that a checkpoint lacks; offline, a hub id has only what was downloaded before."""
    return f"'{path}' has no {name}" + ("" if Path(path).is_dir() else " on the hub or in the local cache")


def to_fetch(path: str, key: str, files: str | None = None) -> str:
    """A second line for such a message: where the hub cannot be reached, how to get its files (None: all), and which
    key is then to name their directory."""
    return "" if Path(path).is_dir() or why_offline() is None else f"\nRun: {by_hand(path, file=files, key=key)}"


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


def _file(path: str, name: str, revision: str | None, mend: str = "") -> str | None:
    from transformers.utils import cached_file

    offline = None if Path(path).is_dir() else why_offline()
    try:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(
            f"reward weights '{path}' were found neither on this disk nor on the hub: {offline or first(error)}{mend}"
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
        raise UserError(
            f"{lacks(path, 'config.json')}: give a transformers checkpoint of a {model_type} model."
            + to_fetch(path, "path")
        )
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


def load_weights_file(path: str | Path, filename: str, revision: str | None, reward: str) -> dict[str, Tensor]:
    """The tensors of a single file of weights, as stored: `path` if it is a file, else `filename` in a directory or a
    hub id at `revision`; .safetensors, or a pickle (.pt, .pth, .bin, .ckpt) that contains no code.

    reward: whose weights they are, to say where to put them. UserError for a file that is missing, damaged, or would
    run code.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix != ".nemo":
        return read_state_dict(local)
    if local.suffix in WEIGHTS and not local.is_dir():
        raise UserError(f"reward.{reward}.path '{path}': no such file.")
    where = locate(path)
    mend = f"\nRun: {by_hand(where, revision, filename, f'reward.{reward}.path')}"
    file = _file(where, filename, revision, mend)
    if file is not None:
        return read_state_dict(Path(file))
    if local.is_dir():
        there = sorted(one.name for one in local.iterdir() if one.suffix in WEIGHTS)
        ending = f"; it has {_some(there)}, each of which may be named itself" if there else ""
        raise UserError(f"reward.{reward}.path '{path}' has no {filename}{ending}.")
    offline = why_offline()
    raise UserError(
        f"reward '{reward}' needs {filename} of '{where}', which is not "
        + (f"on this disk, and {offline}.{mend}" if offline else "on the hub: correct the path.")
    )


def fit(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype | None) -> Any:
    """The network that `make` makes, with exactly these tensors as its weights; frozen, in eval mode, on the CPU.

    where: begins the message of the UserError for names or shapes that do not fit, such as "reward.hpsv2.path 'x.pt'".
    dtype: of the weights, float32 unless given, whatever they are stored in.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():  # which would take longer than reading them
        network = make().to(dtype or torch.float32)
    needed = network.state_dict()
    wrong = [name for name in needed if name in tensors and tensors[name].shape != needed[name].shape]
    differences = {
        "missing": [name for name in needed if name not in tensors],
        "unknown": [name for name in tensors if name not in needed],
        "of another shape": [f"{n} {tuple(tensors[n].shape)}, not {tuple(needed[n].shape)}" for n in wrong],
    }
    if any(differences.values()):
        told = "; ".join(f"{len(names)} {how}: {_some(names)}" for how, names in differences.items() if names)
        raise UserError(f"{where} has not the weights that this reward needs. Tensors {told}.")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def first(error: Exception) -> str:
    """The first line of an error's message, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
