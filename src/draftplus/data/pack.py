"""Packing prompts from anywhere into shards that training starts on at once, and telling what was left out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from draftplus.data.formats import MOST_LINES, SPLITS, Row
from draftplus.data.glance import rows_in
from draftplus.data.index import read_index
from draftplus.data.near import LEAST, folded, near_duplicates
from draftplus.data.prompts import BUILT_IN, load_prompts, prompt_files, rows_of
from draftplus.data.remote import is_remote, remote_rows
from draftplus.data.shards import SUMMARY, refuse_target, shard_names, write_shards
from draftplus.errors import UserError, printable
from draftplus.progress import progress

EXAMPLES = 3  # of what was dropped, for each reason
HELD_OUT = 0.01
AT_A_TIME = 1000  # prompts whose tokens are counted
OFTEN = 10_000  # prompts from one look at the clock to the next

TokensOf = Callable[[Sequence[str]], Sequence[int]]  # prompts -> how many tokens each has


@dataclass(frozen=True)
class PackRules:
    """What is kept of the prompts, and where it goes; the defaults are those of the command.

    near: the similarity from which on a prompt repeats another (`near_duplicates`); None: only what is equal but for
    case, punctuation and white space does. held_out: a share below 1, or a number of prompts; None: as the source says,
    or else 0.01.
    """

    min_words: int | None = None
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    keep_duplicates: bool = False
    near: float | None = None
    held_out: float | None = None
    seed: int = 0
    shard_size: int = 10_000
    max_tokens: int | None = None
    tokenizer: str | None = None

    def check(self) -> None:
        """UserError for a number out of its range."""
        for name in ("min_words", "max_words", "min_characters", "max_characters", "shard_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        for what in ("words", "characters"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low is not None and high is not None and low > high:
                raise UserError(f"--min-{what} {low} is above --max-{what} {high}, so that nothing would be kept")
        if self.near is not None and not LEAST <= self.near <= 1:
            raise UserError(f"--near is {self.near:g}; it must be from {LEAST:g} to 1, such as 0.8")
        if self.near is not None and self.keep_duplicates:
            raise UserError("--near drops near duplicates, and --keep-duplicates keeps all: leave one of them out")
        if self.tokenizer is not None and self.max_tokens is None:
            raise UserError("--tokenizer counts for --max-tokens only; give it too, or leave --tokenizer out")
        share = self.held_out
        if share is not None and not (0 <= share < 1 or (math.isfinite(share) and share == int(share) and share >= 1)):
            raise UserError(
                f"--held-out is {share:g}; give a share below 1, such as 0.01, or a whole number of prompts"
            )


class Kept(NamedTuple):
    """Prompts in order, and of each whether the source holds it out."""

    prompts: list[str]
    held_out: list[bool]


@dataclass
class Dropped:
    """How many prompts were left out, why, and a few of them, with their places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        some = self.examples.setdefault(reason, [])
        if len(some) < EXAMPLES:
            some.append(example[:200])


def pack_prompts(
    sources: Sequence[str | Path], output: str | Path, column: str | None = None, rules: PackRules | None = None,
    overwrite: bool = False, tokens_of: TokensOf | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the prompts of sources, one after another, as tar shards that WebDataset, NeMo-Aligner and training read.

    sources: of `load_prompts`, and data sets of the hub (`remote_rows`). output: a directory, or a range of names in
    one, such as `shards/{00000..00015}.tar`. The shards hold `KEY.txt`, one prompt each; held-out prompts are in a
    shard of their own, as `KEY.json` with their split. An index (`read_index`) and the summary, pack.json, are added.
    The directory appears only once it is complete. The same sources, rules and seed give the same shards.
    tokens_of: what counts for `rules.max_tokens`.

    What is equal but for case, punctuation and white space counts as one prompt, of which the first is kept, a held-out
    one before others. Which are held out depends on the seed and the prompts, not on their order.

    Returns the summary: what was read, kept and dropped, and why. Raises UserError for what cannot be read, for a
    source without usable prompts, and an output that is there already.
    """
    rules = rules or PackRules()
    rules.check()
    directory, names = shard_names(output)
    refuse_target(directory, overwrite)
    dropped = Dropped()
    read, kept = _read(sources, column, rules, dropped)
    if rules.max_tokens is not None:
        assert tokens_of is not None
        kept = _short_enough(kept, rules.max_tokens, tokens_of, dropped)
    kept = _without_repeats(kept, rules, dropped)
    if not kept.prompts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.counts.most_common())
        first = next(iter(dropped.examples.values()), ["nothing was in it"])[0]
        raise UserError(f"no prompt is left of {read:,} ({reasons or 'none read'}); the first one: {first}")
    train, held_out = _split(kept, rules)
    summary = {
        "sources": [str(source) for source in sources], "column": column, "rules": asdict(rules), "read": read,
        "train": len(train), "held_out": len(held_out),
        "dropped": dict(sorted(dropped.counts.items())), "examples": dict(sorted(dropped.examples.items())),
    }  # fmt: skip
    with progress("writing shards", len(train) + len(held_out), unit="prompts") as advance:
        write_shards(directory, names, train, held_out, rules.shard_size, summary, advance)
    return {**summary, "summary": str(directory / SUMMARY)}


def all_rows(source: str | Path, column: str | None) -> Iterator[Row]:
    """The rows of any source of prompts: built in, packed, on the hub, or of files."""
    split: tuple[Sequence[str], Sequence[str]] | None = None if is_remote(source) else read_index(source)
    if str(source) in BUILT_IN:
        prompts = load_prompts(source, column)
        split = prompts.train, prompts.held_out
    if split is None:
        yield from remote_rows(str(source), column) if is_remote(source) else rows_of(source, column)
        return
    for name, some in zip(SPLITS, split, strict=True):
        for number, prompt in enumerate(some, 1):
            yield Row(prompt, name, f"{source} {name} {number}")


def expected(sources: Sequence[str | Path]) -> int | None:
    """About how many rows there are, by which to tell the time; None where that would take as long as reading them."""
    if any(is_remote(source) for source in sources):
        return None
    files = [file for source in sources if str(source) not in BUILT_IN for file in prompt_files(source)]
    return sum(map(rows_in, files)) or None


def _read(sources: Sequence[str | Path], column: str | None, rules: PackRules, dropped: Dropped) -> tuple[int, Kept]:
    read, prompts, held_out = 0, list[str](), list[bool]()
    total = expected(sources)
    with progress("reading prompts", total, unit="prompts") as advance:
        for source in sources:
            for row in all_rows(source, column):
                read += 1
                if read % OFTEN == 0:
                    advance(min(read, total or read), f"{read:,} read" * (not total))
                fault = _fault(row, rules)
                if fault is None:
                    prompts.append(row.prompt)
                    held_out.append(row.split == "held_out")
                else:
                    dropped.add(fault, row.fault or f"{row.place}: {printable(row.prompt)}")
    return read, Kept(prompts, held_out)


def _fault(row: Row, rules: PackRules) -> str | None:
    """Why a row is not kept, in a few words; None where it is."""
    if row.fault is not None:
        return "unusable"
    if row.prompt.count("\n") >= MOST_LINES:
        return f"over {MOST_LINES} lines"
    words = len(row.prompt.split()) if rules.min_words or rules.max_words else 0
    for count, low, high in (
        (words, rules.min_words, rules.max_words),
        (len(row.prompt), rules.min_characters, rules.max_characters),
    ):
        if low is not None and count < low:
            return "too short"
        if high is not None and count > high:
            return "too long"
    return None


def _short_enough(kept: Kept, most: int, tokens_of: TokensOf, dropped: Dropped) -> Kept:
    stays = list[int]()
    with progress("counting tokens", len(kept.prompts), unit="prompts") as advance:
        for begin in range(0, len(kept.prompts), AT_A_TIME):
            some = kept.prompts[begin : begin + AT_A_TIME]
            for number, count in enumerate(tokens_of(some), begin):
                if count <= most:
                    stays.append(number)
                else:
                    dropped.add("with too many tokens", f"{count} tokens: {printable(kept.prompts[number])}")
            advance(begin + len(some), "")
    return Kept([kept.prompts[i] for i in stays], [kept.held_out[i] for i in stays])


def _without_repeats(kept: Kept, rules: PackRules, dropped: Dropped) -> Kept:
    if any(kept.held_out):  # those that are held out first, so that they are the ones that stay
        order = sorted(range(len(kept.prompts)), key=lambda i: not kept.held_out[i])
        kept = Kept([kept.prompts[i] for i in order], [kept.held_out[i] for i in order])
    first: dict[bytes, int] = {}
    stays = list[int]()
    with progress("finding duplicates", len(kept.prompts), unit="prompts") as advance:
        for number, prompt in enumerate(kept.prompts):
            if number % OFTEN == 0:
                advance(number, "")
            before = first.setdefault(_address(folded(prompt)), number)
            if before == number or (rules.keep_duplicates and kept.held_out[before] == kept.held_out[number]):
                stays.append(number)
            elif kept.held_out[before] and not kept.held_out[number]:
                dropped.add("held out too", printable(prompt))
            elif kept.prompts[before] == prompt:
                dropped.add("repeated", printable(prompt))
            else:
                dropped.add("repeated but for case, punctuation or white space", printable(prompt))
    del first
    kept = Kept([kept.prompts[i] for i in stays], [kept.held_out[i] for i in stays])
    if rules.near is None or not kept.prompts:
        return kept
    with progress("finding near duplicates", len(kept.prompts), unit="prompts") as advance:
        repeats = near_duplicates(kept.prompts, rules.near, advance).tolist()
    for number, before in enumerate(repeats):
        if before >= 0:
            told = f"{kept.prompts[number][:90]} (kept: {kept.prompts[before][:90]})"
            dropped.add("nearly repeated", printable(told))
    stays = [number for number, before in enumerate(repeats) if before < 0]
    return Kept([kept.prompts[i] for i in stays], [kept.held_out[i] for i in stays])


def _split(kept: Kept, rules: PackRules) -> tuple[list[str], list[str]]:
    """The prompts to train on, and those that are held out."""
    if rules.held_out == 0:
        return kept.prompts, []
    held_out = kept.held_out
    if rules.held_out is not None or not any(held_out):
        addresses = [_address(folded(prompt), rules.seed) for prompt in kept.prompts]
        distinct = sorted(set(addresses))
        share = HELD_OUT if rules.held_out is None else rules.held_out
        count = int(share) if share >= 1 else min(math.ceil(share * len(distinct)), len(distinct) - 1)
        if count >= len(distinct):
            raise UserError(f"--held-out {count:,} leaves nothing to train on: only {len(distinct):,} prompts are kept")
        chosen = set(distinct[:count])
        held_out = [address in chosen for address in addresses]
    train = [prompt for prompt, held in zip(kept.prompts, held_out, strict=True) if not held]
    if not train:
        raise UserError("only held-out prompts are left: name a number with --held-out to split them anew")
    return train, [prompt for prompt, held in zip(kept.prompts, held_out, strict=True) if held]


def _address(text: str, seed: int | None = None) -> bytes:
    return hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=16).digest()
