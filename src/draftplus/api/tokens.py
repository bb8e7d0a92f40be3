"""How many tokens prompts have, for `pack_prompts`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftplus.data.pack import TokensOf
from draftplus.models.single_file import CONFIGS, tokenizer
from draftplus.rewards.captions import open_tokenizer


def token_counter(name: str | None) -> TokensOf:
    """name: as `PackRules.tokenizer`; of a model in diffusers' format the first of its tokenizers."""
    if name is None:
        opened = tokenizer(CONFIGS / "sd1")
    else:
        local = Path(name).expanduser()
        inside = local / "tokenizer"
        opened = open_tokenizer(str(inside if inside.is_dir() else local if local.is_dir() else name), None)

    def tokens_of(prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in opened(list(prompts), verbose=False)["input_ids"]]

    return tokens_of
