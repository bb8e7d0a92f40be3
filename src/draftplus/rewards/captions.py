"""Tokens of prompts for the rewards whose text encoder reads a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from draftplus.errors import UserError, notice
from draftplus.hub import by_hand, why_offline
from draftplus.rewards.checkpoints import first, has_file, locate

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")  # of which a tokenizer has one at least
_CACHED = 65536  # prompts, whose tokens are some tens of MiB


class Captions:
    """A prompt's tokens, padded to `length` and cut there as in the published procedures; the user is told of a cut."""

    def __init__(self, reward: str, tokenizer: Any, length: int) -> None:
        self.reward = reward
        self.tokenizer = tokenizer
        self.length = length
        self._told = False
        self._cached = lru_cache(_CACHED)(self._told_and_cut)

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The (length,) ids and the (length,) mask, 1 where a token is and 0 where padding is."""
        return self._cached(prompt)

    def tokens(self, text: str) -> tuple[Tensor, Tensor]:
        """Likewise for a text that is not the user's, of whose cut nobody is told."""
        tokens = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return tokens.input_ids[0], tokens.attention_mask[0]

    def _told_and_cut(self, prompt: str) -> tuple[Tensor, Tensor]:
        whole = len(self.tokenizer(prompt, verbose=False).input_ids)
        if whole > self.length and not self._told:
            self._told = True
            tell_of_cut(prompt, whole, f"reward '{self.reward}'", self.length)
        return self.tokens(prompt)


def tell_of_cut(prompt: str, tokens: int, reader: str, length: int) -> None:
    """Says that a prompt's end is not read."""
    notice(
        f"a prompt has {tokens} tokens, and {reader} reads the first {length}; its end, and that of other long "
        f"prompts, has no effect: {prompt[:60]!r}…"
    )


def tokenizer_beside(path: str | Path) -> Path | None:
    """The local directory of weights, a directory or a file in one, if it has the files of a tokenizer."""
    local = Path(path).expanduser()
    folder = local.parent if local.is_file() else local
    return folder if any((folder / name).is_file() for name in _FILES) else None


def load_tokenizer(reward: str, source: str | Path, revision: str | None = None, added: Sequence[str] = ()) -> Any:
    """The tokenizer of a directory or hub id, with the special tokens `added` behind its vocabulary.

    UserError where there is none, naming what to download and where to put it, or where it would run code.
    """
    where = locate(source)
    if not any(has_file(where, name, revision) for name in _FILES):
        # transformers would make an empty tokenizer, for which all prompts are the same
        local = Path(where).is_dir()
        offline = None if local else why_offline()
        mend = f"\nRun: {by_hand(where, revision, key=f'reward.{reward}.args.processor')}" if offline else ""
        absent = f"is not on this disk, and {offline}.{mend}" if offline else f"has none of {', '.join(_FILES)}."
        raise UserError(f"reward '{reward}' needs the tokenizer of '{where}', which {absent}")
    tokenizer = open_tokenizer(where, revision)
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def open_tokenizer(where: str, revision: str | None) -> Any:
    """The tokenizer of a checkpoint that has one. UserError where it is broken or would run code."""
    from transformers import AutoTokenizer

    try:  # unless told not to, transformers would ask on the terminal whether to run code of the checkpoint's
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    except (ValueError, OSError) as error:
        code = "it would run code of its own" if "trust_remote_code" in str(error) else first(error)
        raise UserError(f"the tokenizer in '{where}' cannot be loaded: {code}.") from error
