"""Prompt sets: built-in, or read from files, with a held-out part."""

from __future__ import annotations

import difflib
import glob
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draftplus.data.formats import READERS, TARS, Row, kind_of
from draftplus.data.index import INDEX, Packed, Some, read_index
from draftplus.data.remote import is_remote
from draftplus.errors import UserError
from draftplus.garbage import collection_paused

BUILT_IN = ("animals", "parti")
MOST_FILES = 100_000
UNPACKED_BY = {
    ".gz": "gunzip", ".zst": "zstd -d", ".zstd": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"
}  # fmt: skip
_DIRECTORY = Path(__file__).parents[1] / "assets" / "prompts"
_KNOWN = "a .txt, .jsonl, .json, .csv, .tsv, .parquet or .tar file, or a directory of .tar files"


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, and others to evaluate on; no prompt is in both, ignoring case and white space."""

    train: Sequence[str]
    held_out: Sequence[str]


def load_prompts(source: str | Path, column: str | None = None) -> PromptSet:
    """The prompts of a built-in set ("animals", "parti"), or of files: see `prompt_files` for which.

    - .txt: one prompt per line; empty lines are left out.
    - .jsonl: one object per line; .json: a list of strings or of objects; .csv, .tsv: a table whose first line names
      its columns; .parquet. The prompt is the field `column`, or "prompt", "text" or "caption"; a field "split" may say
      "train" or "held_out".
    - .tar, also compressed: a WebDataset shard, of each sample its .txt, .caption or .json member.
    - a directory that `pack_prompts` wrote: its prompts stay on the disk, and are read as they are asked for.

    Files without splits hold out a tenth of their distinct prompts, rounded up and at most 50, evenly spaced over the
    files; fewer than 5 are all trained on and none is held out. Repeated prompts stay repeated in `train`.

    UserError for a missing, empty, broken or unknown source, a column that it does not have, and for a prompt that is
    in both splits.
    """
    if column is not None and not has_columns(source):
        raise UserError(f"data.column is '{column}', but '{source}' has no columns: leave data.column out.")
    if str(source) in BUILT_IN:
        train, held_out = (read_rows(_DIRECTORY / f"{source}{suffix}.txt") for suffix in ("", "_held_out"))
        return PromptSet([row.prompt for row in train], [row.prompt for row in held_out])
    packed = read_index(source)
    if packed is not None:
        return PromptSet(*packed) if packed[1] else hold_out(packed[0])
    rows = read_rows(source, column)
    if all(row.split is None for row in rows):
        return hold_out([row.prompt for row in rows])
    train = [row for row in rows if row.split != "held_out"]
    held_out = [row for row in rows if row.split == "held_out"]
    places = {normalized(row.prompt): row.place for row in held_out}
    for row in train:
        if normalized(row.prompt) in places:
            both = f"{row.place} and {places[normalized(row.prompt)]}"
            raise UserError(
                f"'{source}' has '{row.prompt}' both for training and held out ({both}): remove one of them."
            )
    if not train:
        raise UserError(f"'{source}' has only held-out prompts: some must have the split train.")
    return PromptSet([row.prompt for row in train], list(dict.fromkeys(row.prompt for row in held_out)))


def read_prompts(source: str | Path, column: str | None = None) -> list[str]:
    """All prompts of a source of `load_prompts`, whatever their split, in its order (built in: held-out ones last).

    column: of files that have columns.
    """
    if str(source) in BUILT_IN:
        prompts = load_prompts(source)
        return [*prompts.train, *prompts.held_out]
    packed = read_index(source)
    if packed is not None:
        return [*packed[0], *packed[1]]
    return [row.prompt for row in read_rows(source, column)]


def hold_out(prompts: Sequence[str]) -> PromptSet:
    """Splits prompts by the rule of `load_prompts`. It depends on the prompts and their order only.

    Of prompts that are on the disk (`Packed`), those to train on stay there.
    """
    kinds, firsts = _kinds(prompts)
    n = len(firsts)
    count = min(math.ceil(n / 10), 50) if n >= 5 else 0
    chosen = [int(firsts[(2 * i + 1) * n // (2 * count)]) for i in range(count)]
    stay = np.flatnonzero(~np.isin(kinds, kinds[chosen]))
    train = Some(prompts, stay) if isinstance(prompts, Packed) else [prompts[i] for i in stay.tolist()]
    return PromptSet(train, [prompts[i] for i in chosen])


def _kinds(prompts: Sequence[str]) -> tuple[Ints, Ints]:
    """A number for each prompt, the same for those that are the same when `normalized`, and where each kind is first.

    By 128 bits of a hash, since a million texts would fill the memory.
    """
    hashes = bytearray()
    for prompt in prompts:
        hashes += hashlib.blake2b(normalized(prompt).encode(), digest_size=16).digest()
    low, high = np.frombuffer(hashes, np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # which keeps the order of equal ones
    differ = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
    begins = np.concatenate([np.ones(min(1, len(order)), bool), differ])
    kinds = np.empty(len(order), np.int64)
    kinds[order] = np.cumsum(begins) - 1
    return kinds, np.sort(order[begins])


def normalized(prompt: str) -> str:
    """The prompt without differences in case and white space, to compare it with others."""
    return " ".join(prompt.split()).casefold()


def has_columns(source: str | Path) -> bool:
    """Whether the prompts of a source stand in a field with a name."""
    plain = str(source).lower().endswith((".txt", ".txt.gz")) or (Path(source).expanduser() / INDEX).is_file()
    return str(source) not in BUILT_IN and not plain


def prompt_files(source: str | Path) -> list[Path]:
    """The files that a source names, in order: a file; the .tar files of a directory; those that match a glob such as
    `shards/*.tar`; a range such as `{00000..00099}.tar`, every file of which must be there.

    UserError for a source that names none.
    """
    if is_remote(source):
        raise UserError(f"'{source}' is on the hub: fetch its prompts first, by draftplus data pack '{source}' -o DIR")
    path = Path(source).expanduser()
    if path.is_dir():
        shards = sorted(one for one in path.iterdir() if one.name.lower().endswith(TARS))
        if not shards:
            raise UserError(f"prompts '{source}' is a directory without .tar files: give {_KNOWN}.")
        return shards
    if path.exists():
        return [path]
    files = [one for name in expanded(str(path)) for one in matching(name)]
    absent = [one for one in files if not one.exists()]
    if files and not absent:
        return files
    if kind_of(path) or path.suffix:
        more = f" ({absent[0]} and {len(absent) - 1} more)" if len(absent) > 1 else ""
        more = more or (f" ({absent[0]} is missing)" if len(files) > 1 else "")
        raise UserError(f"no prompt file '{source}'{more}: check data.prompts, eval.prompts or the command line.")
    near = difflib.get_close_matches(str(source), BUILT_IN, n=1, cutoff=0.0)
    raise UserError(f"no prompt set '{source}': did you mean the built-in set '{near[0]}'? Otherwise give {_KNOWN}.")


def expanded(text: str) -> list[str]:
    import braceexpand

    # braceexpand makes every name before it gives the first
    sizes = (abs(int(end) - int(begin)) + 1 for begin, end in re.findall(r"{(-?\d+)\.\.(-?\d+)", text))
    if math.prod(sizes) > MOST_FILES:
        raise UserError(f"'{text}' names more than {MOST_FILES:,} files; give fewer.")
    try:
        return list(braceexpand.braceexpand(text, escape=False))
    except ValueError:  # braces that do not match
        return [text]


def matching(name: str) -> list[Path]:
    return [Path(one) for one in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else [Path(name)]


def rows_of(source: str | Path, column: str | None = None) -> Iterator[Row]:
    """What a source of files holds, in order, also what is no prompt, with its `fault`.

    Raises UserError for what cannot be read.
    """
    files = prompt_files(source)
    for path in files:
        kind = kind_of(path)
        if kind is None:
            raise UserError(_unknown(path))
        if not path.is_file():
            raise UserError(f"cannot read prompts from '{path}', which is not a file: give {_KNOWN}.")
        for row in READERS[kind](path, column if has_columns(path) else None):
            yield row._replace(place=f"{path}, {row.place}") if len(files) > 1 else row


def _unknown(path: Path) -> str:
    packer = UNPACKED_BY.get(path.suffix.lower())
    if packer is not None:
        return f"cannot read prompts from '{path}', which is compressed: unpack it first, by {packer} '{path}'."
    return f"cannot read prompts from '{path}': give {_KNOWN}."


def read_rows(source: str | Path, column: str | None = None) -> list[Row]:
    """What a source of files holds, in order. Raises UserError for what cannot be read or is no prompt."""
    rows = []
    with collection_paused():
        for row in rows_of(source, column):
            if row.fault is not None:
                raise UserError(row.fault)
            rows.append(row)
    if not rows:
        tar = all(kind_of(path) in TARS for path in prompt_files(source))
        member = ".txt member, .caption member or .json member" if tar else "prompt"
        raise UserError(f"'{source}' has no prompts: it needs at least one {member}.")
    return rows
