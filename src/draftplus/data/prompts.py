"""Prompt sets: built-in, or read from a .txt, .jsonl or WebDataset .tar file, with a held-out part."""

from __future__ import annotations

import difflib
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftplus.errors import UserError

BUILT_IN = ("animals",)
_DIRECTORY = Path(__file__).parents[1] / "assets" / "prompts"
_FIELDS = ("prompt", "text", "caption")
_SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, and others to evaluate on; no prompt is in both, ignoring case and white space."""

    train: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class _Row:
    prompt: str
    split: str | None
    place: str


def load_prompts(source: str | Path) -> PromptSet:
    """The prompts of a built-in set ("animals"), or of a file.

    - .txt: one prompt per line; empty lines and lines starting with # are left out.
    - .jsonl: one object per line with "prompt", "text" or "caption", and optionally "split": "train" or "held_out".
    - .tar: a WebDataset shard, its `txt` members.

    A file without splits holds out a tenth of its distinct prompts, rounded up and at most 50, evenly spaced over the
    file; fewer than 5 are all trained on and none is held out. Repeated prompts stay repeated in `train`.

    UserError for a missing, empty, broken or unknown source, and for a prompt that is in both splits.
    """
    if str(source) in BUILT_IN:
        train, held_out = (_read_txt(_DIRECTORY / f"{source}{suffix}.txt") for suffix in ("", "_held_out"))
        return PromptSet([row.prompt for row in train], [row.prompt for row in held_out])
    rows = _read(source)
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


def read_prompts(source: str | Path) -> list[str]:
    """All prompts of a source of `load_prompts`, whatever their split, in its order (built in: held-out ones last)."""
    if str(source) in BUILT_IN:
        prompts = load_prompts(source)
        return prompts.train + prompts.held_out
    return [row.prompt for row in _read(source)]


def hold_out(prompts: Sequence[str]) -> PromptSet:
    """Splits prompts by the rule of `load_prompts`. It depends on the prompts and their order only."""
    distinct: dict[str, str] = {}
    for prompt in prompts:
        distinct.setdefault(normalized(prompt), prompt)
    n, keys = len(distinct), list(distinct)
    count = min(math.ceil(n / 10), 50) if n >= 5 else 0
    chosen = {keys[(2 * i + 1) * n // (2 * count)]: None for i in range(count)}  # a dict, to keep the order
    return PromptSet([p for p in prompts if normalized(p) not in chosen], [distinct[key] for key in chosen])


def normalized(prompt: str) -> str:
    """The prompt without differences in case and white space, to compare it with others."""
    return " ".join(prompt.split()).casefold()


def _read(source: str | Path) -> list[_Row]:
    path = Path(source).expanduser()
    readers: dict[str, Callable[[Path], list[_Row]]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".tar": _read_tar}
    known = "a .txt, .jsonl or .tar file"
    if path.is_dir():
        raise UserError(f"prompts '{source}' is a directory: give {known}.")
    if not path.exists():
        if path.suffix:
            raise UserError(f"no prompt file '{source}': check data.prompts, eval.prompts or the command line.")
        near = difflib.get_close_matches(str(source), BUILT_IN, n=1, cutoff=0.0)
        raise UserError(f"no prompt set '{source}': did you mean the built-in set '{near[0]}'? Otherwise give {known}.")
    if path.suffix.lower() not in readers:
        raise UserError(f"cannot read prompts from '{source}': give {known}.")
    rows = readers[path.suffix.lower()](path)
    if not rows:
        member = ".txt member" if path.suffix.lower() == ".tar" else "prompt"
        raise UserError(f"'{source}' has no prompts: it needs at least one {member}.")
    return rows


def _read_txt(path: Path) -> list[_Row]:
    lines = enumerate(_text(path.read_bytes(), str(path)).splitlines(), start=1)
    return [_Row(line.strip(), None, f"line {n}") for n, line in lines if line.strip() and not line.startswith("#")]


def _read_jsonl(path: Path) -> list[_Row]:
    # split at newlines only: splitlines would also cut at U+2028, which JSON allows inside a string
    lines = enumerate(_text(path.read_bytes(), str(path)).split("\n"), start=1)
    return [_json_row(line, f"{path}, line {n}", n) for n, line in lines if line.strip()]


def _json_row(line: str, place: str, number: int) -> _Row:
    example = '{"prompt": "a cat"}'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); each line must be an object such as {example}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: {line.strip()[:40]} is not an object; each line must be an object such as {example}")
    field = next((name for name in _FIELDS if name in value), None)
    if field is None:
        raise UserError(
            f"{place}: none of the fields {', '.join(_FIELDS)}, but only {', '.join(value) or 'an empty object'}: "
            "rename the field that holds the prompt."
        )
    prompt, split = value[field], value.get("split")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{place}: {field} is {json.dumps(prompt)[:40]}; it must be a string that is not empty.")
    if split is not None and split not in _SPLITS:
        raise UserError(f"{place}: split is {json.dumps(split)[:40]}; it must be {' or '.join(_SPLITS)}.")
    return _Row(prompt.strip(), split, f"line {number}")


def _read_tar(path: Path) -> list[_Row]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        _require_complete(path)
        with path.open("rb") as stream:
            files = tar_file_expander([{"url": str(path), "stream": stream}], select_files=lambda n: n.endswith(".txt"))
            texts = [(sample["__key__"], sample["txt"]) for sample in group_by_keys(files) if "txt" in sample]
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"'{path}' is truncated or not a tar file ({error.args[0]}): download or create it again."
        ) from error
    prompts = [_text(data, f"{path}, member {key}.txt").strip() for key, data in texts]
    return [_Row(prompt, None, f"member {key}.txt") for prompt, (key, _) in zip(prompts, texts, strict=True) if prompt]


def _require_complete(path: Path) -> None:
    # tarfile takes a cut between two members, or a header that makes no sense, for the end of the archive: only the
    # block of zeros in the place of the next header shows that nothing is missing
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with path.open("rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a member nor the end mark at byte {end}")


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place} is not UTF-8 text (byte {error.start}, line {line}): save it as UTF-8.") from error
