"""Which files of a model directory are loaded: exactly these are checked, and fetched if the model is on the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from draftplus.errors import UserError

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, vocabularies and templates


@dataclass(frozen=True)
class Stored:
    """The form in which a part's weights are stored. file: the weights, or the index of several files.

    safetensors, variant: what the libraries' loaders are told, so that they read this file and no other.
    """

    file: str
    safetensors: bool
    variant: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        return {"use_safetensors": self.safetensors, "variant": self.variant}


def forms(names: Collection[str], of_diffusers: bool) -> list[Stored]:
    """The forms of weights among a folder's files, those first that the library prefers.

    of_diffusers: whether diffusers loads them, or transformers, which have names and an order of their own.
    """
    stems = ("diffusion_pytorch_model",) * 2 if of_diffusers else ("model", "pytorch_model")
    found = []
    for stem, ending in zip(stems, ("safetensors", "bin"), strict=True):
        single = rf"{stem}(?:\.(.+))?\.{ending}"
        indexes = [rf"{stem}\.{ending}\.index(?:\.(.+))?\.json", rf"{stem}\.{ending}\.(.+)\.index\.json"]
        for form in [*indexes, single] if of_diffusers else [single, *indexes]:
            for match in filter(None, (re.fullmatch(form, name) for name in sorted(names))):
                if not SHARD.search(match[1] or ""):
                    found.append(Stored(match[0], ending == "safetensors", match[1]))
    return found


def choose(stored: Sequence[Stored], variant: str | None, where: str) -> Stored | None:
    """What is loaded of a part, None where it has no weights.

    variant: None is the files without one, or the only variant that there is. A part that lacks the variant asked for
    is loaded without, as by stock diffusers.

    Raises UserError, which begins with `where`, if it is not clear which variant is meant.
    """
    for wanted in (variant, None):
        for one in stored:
            if one.variant == wanted:
                return one
    others = sorted({str(one.variant) for one in stored})
    if len(others) > 1 or (others and variant is not None):
        raise UserError(f"{where}: its weights are {' or '.join(others)}; choose with model.variant={others[0]}")
    return stored[0] if stored else None


def refuse_unknown_variant(parts: Mapping[str, Sequence[Stored]], variant: str | None, where: str) -> None:
    """UserError if a variant is asked for that none of the parts has."""
    there = sorted({one.variant for stored in parts.values() for one in stored if one.variant is not None})
    if variant is not None and variant not in there:
        raise UserError(
            f"model.variant '{variant}': {where} has no such weights; its variants: {', '.join(there) or 'none'}"
        )


def names_in(folder: Path) -> list[str]:
    """The names of a folder's files; none if there is no such folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def files_of(folder: Path, stored: Stored) -> list[Path]:
    """The files of weights: one, or those that the index names.

    Raises UserError for an index that cannot be read.
    """
    file = folder / stored.file
    if file.suffix != ".json":
        return [file]
    try:
        return [folder / name for name in sorted(set(json.loads(file.read_text("utf-8"))["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not an index of weights") from None


def loaded_from(folder: Path, of_diffusers: bool, variant: str | None) -> list[Path]:
    """The weights in a folder that are loaded, as far as they are there: one file, or several.

    Raises UserError as `choose` and `files_of` do.
    """
    stored = choose(forms(names_in(folder), of_diffusers), variant, str(folder))
    return [file for file in files_of(folder, stored) if file.is_file()] if stored else []


def check(folder: Path, stored: Stored) -> None:
    """UserError if a file that will be loaded is not there, or is a pickle that contains more than tensors."""
    from draftplus.weights import read_state_dict, refuse_pointer  # torch, which the names of files do without

    for file in files_of(folder, stored):
        if not file.is_file():
            raise UserError(f"{file}: it is missing, but {stored.file} names it; download or copy the model once more")
        refuse_pointer(file)
        if not stored.safetensors:
            read_state_dict(file)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, which is read once in a process unless it changes."""
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory in the hub's cache with a hub id's files of these patterns, fetched unless they are there.

    Raises whatever the hub's library raises.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))


def names_on_hub(path: str, fetched: Path) -> dict[str, list[str]]:
    """The names of a hub id's files, by folder; without the hub, of those that are in its cache.

    fetched: what `fetch` gave, whose name is the commit.
    """
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(path, revision=fetched.name)
    except Exception:  # the hub's, the network's and the disk's errors have no base class in common
        listed = [file.relative_to(fetched).as_posix() for file in fetched.rglob("*") if file.is_file()]
    names: dict[str, list[str]] = {}
    for name in listed:
        folder, _, file = name.rpartition("/")
        names.setdefault(folder, []).append(file)
    return names
