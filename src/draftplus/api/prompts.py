"""What `draftplus data` does, functions do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftplus.data.pack import PackRules
from draftplus.data.pack import pack_prompts as _pack_prompts
from draftplus.data.show import describe_prompts


def pack_prompts(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    column: str | None = None,
    rules: PackRules | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes prompts of files, built-in sets and data sets of the hub as shards for `data.prompts`.

    output: a directory, or a range of names in one, such as `prompts/{00000..00015}.tar`. column: of what has columns.
    rules: what is dropped and held out. overwrite: whether packed prompts that are there are replaced.

    Returns the summary, which is in `output`/pack.json too. Raises UserError for a user's mistake.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else sources
    rules, counter = rules or PackRules(), None
    if rules.max_tokens is not None:
        rules.check()
        from draftplus.api.tokens import token_counter  # which needs libraries that nothing else here does

        counter = token_counter(rules.tokenizer)
    return _pack_prompts(listed, output, column, rules, overwrite, counter)


def show_prompts(source: str | Path, column: str | None = None, examples: int = 5) -> dict[str, Any]:
    """What is in a source of prompts: counts, lengths, duplicates, held-out part, examples.

    Raises UserError for a user's mistake.
    """
    return describe_prompts(source, column, examples)
