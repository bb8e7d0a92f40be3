"""`draftplus data show`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from draftplus.cli.shared import examples
from draftplus.errors import printable

EXAMPLES = examples(
    "Examples:\n  draftplus data show prompts\n  draftplus data show captions.parquet --column TEXT --json"
)
BAR = 40  # signs


def show(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Built-in set, prompt file, shards or hf://datasets/OWNER/NAME.")
    ],
    column: Annotated[str | None, typer.Option("--column", help="Field of the prompts, as data.column.")] = None,
    number: Annotated[int, typer.Option("--examples", min=0, help="How many prompts to show.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a set of prompts: counts, lengths, duplicates, held-out part, examples."""
    from draftplus.config import refuse_nobodys_home
    from draftplus.data.show import describe_prompts

    refuse_nobodys_home("SOURCE", source)
    told = describe_prompts(source, column, number)
    print(json.dumps(told, indent=1, ensure_ascii=False) if as_json else printable("\n".join(_lines(told))))


def _lines(told: dict[str, Any]) -> list[str]:
    lines = [f"prompts      {told['prompts']:,}, {told['distinct']:,} distinct"]
    if told["files"]:
        files, size = told["files"], told["bytes"]
        which = files[0] if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1]}"
        lines.append(f"files        {which}, {size:,} bytes{', with an index' if told['indexed'] else ''}")
    if told["columns"]:
        lines.append(f"columns      {', '.join(told['columns'])}")
    lines.append(
        f"repeated     {told['repeated']:,} exactly, {told['repeated_but_for_form']:,} but for case, punctuation or "
        "white space"
    )
    if told["unusable"]:
        lines.append(f"unusable     {told['unusable']:,}, such as {told['first_unusable']}")
    if told["refused"] is not None:
        lines.append(f"training     refuses it: {told['refused']}")
    else:
        lines.append(f"training     {told['train']:,} to train on, {told['held_out']:,} held out")
    for what in ("words", "characters"):
        if told[what] is not None:
            lines.append(f"{what:<13}" + ", ".join(f"{name} {value:g}" for name, value in told[what].items()))
    most = max((count for *_, count in told["histogram"]), default=0)
    for begin, end, count in told["histogram"]:
        if count:
            span = f"{begin} to {end - 1} words" if end is not None else f"{begin} words or more"
            lines.append(f"  {span:<18} {'#' * max(1, round(BAR * count / most)):<{BAR}} {count:,}")
    return [*lines, *(["examples"] if told["examples"] else []), *(f"  {text}" for text in told["examples"])]
