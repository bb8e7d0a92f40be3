"""What is in a source of prompts: counts, lengths, repeats, examples."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from draftplus.data.glance import columns_of
from draftplus.data.index import INDEX
from draftplus.data.near import folded
from draftplus.data.pack import OFTEN, all_rows, expected
from draftplus.data.prompts import BUILT_IN, load_prompts, prompt_files
from draftplus.data.remote import is_remote
from draftplus.errors import UserError
from draftplus.progress import progress

BOUNDS = (0, 5, 10, 15, 20, 30, 50, 75, 100)  # of the histogram, in words


def describe_prompts(source: str | Path, column: str | None = None, examples: int = 5) -> dict[str, Any]:
    """What a source of prompts holds, in terms of JSON.

    files, bytes; columns: those found in its first file; indexed: whether it is a packed directory; prompts, unusable,
    with the first such; distinct, and repeated: exactly, and but for case, punctuation and white space; words and
    characters: least, median, mean, most; histogram: [from, to, count] in words, `to` left out, null for the last;
    train, held_out: as training splits them, null where it would refuse the source; examples: evenly spaced.

    Raises UserError for what cannot be read.
    """
    local = str(source) not in BUILT_IN and not is_remote(source)
    files = prompt_files(source) if local else []
    exact, same = Counter[bytes](), set[bytes]()
    words, characters, texts = list[int](), list[int](), list[str]()
    unusable, first_fault, step = 0, None, 1
    total = expected([source])
    with progress("reading prompts", total, unit="prompts") as advance:
        for row in all_rows(source, column):
            if row.fault is not None:
                unusable, first_fault = unusable + 1, first_fault or row.fault
                continue
            if len(words) % step == 0:  # evenly spaced, however many there will be
                texts.append(row.prompt)
                if len(texts) > 2 * examples:
                    del texts[1::2]
                    step *= 2
            exact[_digest(row.prompt)] += 1
            same.add(_digest(folded(row.prompt)))
            words.append(len(row.prompt.split()))
            characters.append(len(row.prompt))
            if len(words) % OFTEN == 0:
                advance(min(len(words), total or len(words)), f"{len(words):,} read" * (not total))
    train, held_out, refused = _as_trained(source, column)
    return {
        "source": str(source), "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files), "columns": columns_of(files[0]) if files else [],
        "indexed": bool(files) and (Path(source).expanduser() / INDEX).is_file(),
        "prompts": len(words), "unusable": unusable, "first_unusable": first_fault,
        "distinct": len(same), "repeated": len(words) - len(exact), "repeated_but_for_form": len(exact) - len(same),
        "words": _summary(words), "characters": _summary(characters), "histogram": _histogram(words),
        "train": train, "held_out": held_out, "refused": refused,
        "examples": [texts[i * len(texts) // examples] for i in range(min(examples, len(texts)))]
        if len(texts) > examples
        else texts,
    }  # fmt: skip


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _as_trained(source: str | Path, column: str | None) -> tuple[int | None, int | None, str | None]:
    """How training splits a source; of what it refuses, why."""
    if is_remote(source):
        return None, None, "training reads no data set of the hub: pack it first"
    try:
        prompts = load_prompts(source, column)
    except UserError as error:
        return None, None, str(error)
    return len(prompts.train), len(prompts.held_out), None


def _summary(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "least": min(values), "median": statistics.median(values), "mean": round(statistics.fmean(values), 2),
        "most": max(values),
    }  # fmt: skip


def _histogram(words: list[int]) -> list[tuple[int, int | None, int]]:
    counts = Counter(max(i for i, bound in enumerate(BOUNDS) if bound <= count) for count in words)
    ends = [*BOUNDS[1:], None]
    return [(begin, end, counts[i]) for i, (begin, end) in enumerate(zip(BOUNDS, ends, strict=True))]
