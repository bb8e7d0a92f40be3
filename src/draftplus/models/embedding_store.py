"""Prompts' embeddings on disk, so that a large text encoder embeds each prompt once for all runs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from draftplus import __version__
from draftplus.distributed import sent
from draftplus.errors import UserError, first_line, notice
from draftplus.models.files import SMALL, file_hash, files_of
from draftplus.models.loading import Source
from draftplus.models.truncation import Cuts
from draftplus.types import Conditioning

T = TypeVar("T")

FORMAT = 1  # of the files
CACHE, SIZE = "DRAFTPLUS_CACHE", "DRAFTPLUS_CACHE_GB"
DEFAULT_GB = 20.0
SLACK = 0.01  # of the limit is kept free, so that not every new file has the directory looked through
ENCODING = ("text_encoder", "tokenizer")  # how the folders begin that decide an embedding
CONFIGS = tuple(pattern.removeprefix("*") for pattern in SMALL)  # what shapes an embedding besides weights


class Found(NamedTuple):
    """A prompt's embedding, one row, and the encoders for which the prompt was too long."""

    row: Conditioning
    cuts: Cuts


class EmbeddingStore:
    """A bounded directory of embeddings, one safetensors file each, which several processes may share.

    decided_by: gives all that decides an embedding besides the prompt, in terms of JSON; called once it is needed.
    device: where embeddings go, and where they were made: another kind of device rounds in another way. directory,
    limit: of the files, in bytes; None: as the environment says.

    Raises UserError for a limit in the environment that is not a size.
    """

    def __init__(
        self, decided_by: Callable[[], Mapping[str, object]], device: torch.device, directory: Path | None = None,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        self._decided_by, self._device = decided_by, device
        self.directory = directory or cache_directory() / "embeddings"
        self._limit = _limit() if limit is None else limit
        self._own: frozenset[str] = frozenset()
        self._unseen: float = math.inf  # bytes written since the directory was last looked through
        self._said = False
        self.writable = True

    @cached_property
    def _told(self) -> str:
        # another version of a library, or of ours, may embed in another way
        libraries = {name: version(name) for name in ("diffusers", "transformers", "torch")} | {"ours": __version__}
        return json.dumps([FORMAT, dict(self._decided_by()), libraries, self._device.type], sort_keys=True)

    def name(self, prompt: str | None) -> str:
        """The name of a prompt's file; None is a prompt too, and not the empty one."""
        return hashlib.sha256(json.dumps([self._told, prompt]).encode()).hexdigest() + ".safetensors"

    def keep(self, prompts: Iterable[str | None]) -> None:
        """From now on, the files of these prompts are never removed to make room for others."""
        self._own = frozenset(map(self.name, prompts))

    def get(self, prompt: str | None) -> Found | None:
        """A prompt's embedding, bit for bit as it was made; None where it is not there, or damaged."""
        return self._read(prompt, lambda file: _found(file, self._device))

    def size(self, prompt: str | None) -> tuple[int, Cuts] | None:
        """The bytes of a prompt's file, and for which encoders it was too long; None where `get` would find none.

        The tensors are not read, so that damage inside them is not seen.
        """
        return self._read(prompt, lambda file: (file.stat().st_size, _header(file)[0]))

    def put(self, prompt: str | None, row: Conditioning, cuts: Cuts) -> int | None:
        """Writes a prompt's embedding. Returns its bytes; None where it cannot be written, which is said once."""
        if not self.writable:
            return None
        tensors = {"hidden": row.hidden, **{f"extras.{key}": tensor for key, tensor in row.extras.items()}}
        tensors |= {} if row.mask is None else {"mask": row.mask}
        # copies, because safetensors refuses tensors that share memory
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        told = {"checksum": str(_checksum(tensors)), "cuts": json.dumps(cuts)}
        building = self.directory / f".{uuid.uuid4().hex}.building"  # whoever shares the directory
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, building, told)
            building.chmod(self.directory.stat().st_mode & 0o666)  # safetensors makes its files private
            size = building.stat().st_size
            building.replace(self.directory / self.name(prompt))
            self._unseen += size
            if self._unseen > self._limit * SLACK:
                self._make_room()
            return size
        except (OSError, SafetensorError) as error:
            self.writable = False
            notice(
                f"{self.directory}: embeddings of prompts cannot be kept there ({first_line(error)}), so the text "
                f"encoders stay in memory; to keep them elsewhere, set {CACHE} to a directory"
            )
            return None
        finally:
            with suppress(OSError):
                building.unlink(missing_ok=True)

    def refuse_too_many(self, sizes: Sequence[int], prompts: int) -> None:
        """UserError if this many prompts need more than the limit. sizes: in bytes, of those that are known."""
        needed = sum(sizes) / len(sizes) * prompts if sizes else 0
        if needed > self._limit:
            gigabytes = math.ceil(needed / 1e8) / 10
            raise UserError(
                f"the embeddings of {prompts:,} prompts take about {gigabytes:,.1f} GB on disk, and {SIZE} allows "
                f"{self._limit / 1e9:g}; set {SIZE}={math.ceil(gigabytes * 1.05)} if {self.directory} has the room, or "
                "use fewer prompts"
            )

    def _read(self, prompt: str | None, read: Callable[[Path], T]) -> T | None:
        file = self.directory / self.name(prompt)
        try:
            told = read(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            if not file.exists():  # another process removed it meanwhile, of which torch makes a RuntimeError
                return None
            if not self._said:
                self._said = True
                notice(f"{file}: damaged ({first_line(error)}); this file, and others like it, are made again")
            return None
        with suppress(OSError):
            os.utime(file)  # was used now
        return told

    def _make_room(self) -> None:
        """Removes files, those first that were used the longest ago, down to the limit less the slack."""
        self._unseen = 0
        files = []
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):  # another process makes room too
                told = entry.stat()
                files.append((told.st_mtime_ns, told.st_size, entry))
        total = sum(size for _, size, _ in files)
        for _, size, entry in sorted(files, key=lambda file: file[0]):
            if total <= self._limit * (1 - SLACK):
                break
            if entry.name not in self._own:
                with suppress(OSError):  # another user's
                    Path(entry.path).unlink(missing_ok=True)
                    total -= size


def cache_directory() -> Path:
    """Where draftplus keeps what it can make again: `DRAFTPLUS_CACHE`, or draftplus/ in the user's cache directory."""
    given, of_user = os.environ.get(CACHE), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given:
            return Path(given).expanduser()
        return (Path(of_user) if os.path.isabs(of_user) else Path.home() / ".cache") / "draftplus"
    except RuntimeError:
        return Path(os.devnull)  # nobody's home, where nothing can be kept


def store_of(label: str, source: Source, path: str, dtype: torch.dtype, device: torch.device) -> EmbeddingStore:
    """The store of a model's embeddings. label: of its family. path: that of the model. dtype: of its encoders.

    Raises UserError as `EmbeddingStore` does.
    """

    def decided_by() -> Mapping[str, object]:
        told = {"family": label, "encoders": encoders_hash(source, path), "dtype": str(dtype)}
        return told if source.config.quantize is None else {**told, "quantize": source.config.quantize}

    return EmbeddingStore(decided_by, device)


def encoders_hash(source: Source, path: str) -> str:
    """What identifies how a model embeds: the SHA-256 of its text encoders and tokenizers, and of the other parts'
    configurations, by which a family may tell its models apart; of a hub model, its id and commit.

    Raises UserError for an index of weights that cannot be read.
    """
    stored = {name: one for name, one in source.stored.items() if name.startswith(ENCODING)}
    if not Path(path).expanduser().exists():
        return f"{path}@{source.directory.name} {sorted(one.file for one in stored.values() if one)}"
    files = {"": Path(path).expanduser() if source.state is not None else source.directory / "model_index.json"}
    for folder in (one for one in source.directory.iterdir() if one.is_dir()):
        names = CONFIGS if folder.name.startswith(ENCODING) else ("/config.json",)
        weights = stored.get(folder.name)
        inside = [file for file in folder.iterdir() if f"/{file.name}".endswith(names)]
        inside += files_of(folder, weights) if weights else []
        files |= {f"{folder.name}/{file.name}": file for file in inside}
    told = sorted((name, file_hash(file)) for name, file in files.items())
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _limit() -> int:
    given = os.environ.get(SIZE) or str(DEFAULT_GB)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise UserError(f"{SIZE} is '{given}'; it must be a number of gigabytes above 0, such as {DEFAULT_GB:g}")
    return int(gigabytes * 1e9)


def _header(file: Path) -> tuple[Cuts, str]:
    """For which encoders a prompt was too long, and the checksum. Raises whatever a damaged file leads to."""
    with safe_open(file, "pt") as opened:
        told = opened.metadata() or {}
    cuts = {str(reader): (int(tokens), int(limit)) for reader, (tokens, limit) in json.loads(told["cuts"]).items()}
    return cuts, told["checksum"]


def _found(file: Path, device: torch.device) -> Found:
    cuts, checksum = _header(file)
    tensors = load(file.read_bytes())  # not mapped: another process may replace or remove the file
    if str(_checksum(tensors)) != checksum:
        raise ValueError("its content does not match its checksum")
    tensors = {key: sent(tensor.clone(), device) for key, tensor in tensors.items()}  # each in memory of its own
    extras = {key.removeprefix("extras."): tensor for key, tensor in tensors.items() if key.startswith("extras.")}
    return Found(Conditioning(tensors["hidden"], tensors.get("mask"), extras), cuts)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of tensors on the CPU, with their names, types and shapes."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, checksum)
    return checksum
