"""`draftplus data pack`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import examples
from draftplus.errors import printable

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus data pack prompts.txt more.csv -o prompts\n"
    "  draftplus data pack captions.parquet --column TEXT --min-words 3 --max-words 60 --near 0.8 -o prompts\n"
    "  draftplus data pack 'shards/{00000..00099}.tar' --held-out 500 --seed 1 -o 'prompts/{00000..00015}.tar'\n"
    "  draftplus data pack 'hf://datasets/OWNER/NAME/data/train-*.parquet' --column caption -o prompts\n"
    "  draftplus train sd15 data.prompts=prompts"
)


def pack(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Prompt files, shards, built-in sets or hf://datasets/OWNER/NAME."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR|PATTERN",
            help="Directory for the shards, or their names in one, such as prompts/{00000..00015}.tar.",
        ),
    ],
    column: Annotated[str | None, typer.Option("--column", help="Field of the prompts, as data.column.")] = None,
    min_words: Annotated[int | None, typer.Option("--min-words", help="Drop prompts of fewer words.")] = None,
    max_words: Annotated[int | None, typer.Option("--max-words", help="Drop prompts of more words.")] = None,
    min_characters: Annotated[int | None, typer.Option("--min-characters", help="The same in characters.")] = None,
    max_characters: Annotated[int | None, typer.Option("--max-characters", help="The same in characters.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", help="Drop prompts of more tokens, start and end included, such as 77, which CLIP reads."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="DIR|ID",
            help="What counts tokens: a model's or reward's directory, or a hub id. Default: CLIP's tokenizer.",
        ),
    ] = None,
    near: Annotated[
        float | None,
        typer.Option(
            "--near", help="Also drop what shares this much of its word pairs with an earlier prompt: 0.5 to 1."
        ),
    ] = None,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Drop no repeated prompts.")] = False,
    held_out: Annotated[
        float | None,
        typer.Option(
            "--held-out",
            help="Share or number of prompts to hold out. Default: those that the source holds out, or 0.01.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which are held out.")] = 0,
    shard_size: Annotated[
        int, typer.Option("--shard-size", help="Prompts in a shard, where its name is not given.")
    ] = 10_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace packed prompts that are there.")] = False,
) -> None:
    """Pack prompts into tar shards without duplicates and with a held-out part. What is dropped is told."""
    from draftplus.config import refuse_nobodys_home
    from draftplus.data.pack import PackRules, pack_prompts

    for option, path in (("SOURCE", source) for source in sources):
        refuse_nobodys_home(option, path)
    refuse_nobodys_home("--output", str(output))
    if tokenizer is not None:
        refuse_nobodys_home("--tokenizer", tokenizer)
    rules = PackRules(
        min_words, max_words, min_characters, max_characters, keep_duplicates, near, held_out, seed, shard_size,
        max_tokens, tokenizer,
    )  # fmt: skip
    tokens_of = None
    if max_tokens is not None:
        rules.check()
        from draftplus.api.tokens import token_counter

        tokens_of = token_counter(tokenizer)
    told = pack_prompts(sources, output, column, rules, overwrite, tokens_of)
    for reason, count in told["dropped"].items():
        example = told["examples"][reason][0]
        print(printable(f"dropped {count:,} {reason}, such as {example}"), file=sys.stderr)
    print(f"read:     {told['read']:,} prompts\nkept:     {told['train']:,} to train on, {told['held_out']:,} held out")
    print(f"packed:   {Path(told['summary']).parent}")
