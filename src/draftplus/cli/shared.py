"""What several commands share: options, examples, and lists on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from draftplus.errors import UserError

LoraScale = Annotated[
    float, typer.Option("--lora-scale", help="Strength of the LoRA adapter: 0 is the base model, 1 the tuned one.")
]
Anneal = Annotated[
    str | None,
    typer.Option(
        "--anneal",
        help="Schedule from the base model to the tuned one, instead of a gate: linear, power:2, step:0.6, tuned.",
    ),
]

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that a recipe, sweep file or run names as a reward, and remember that."),
]


def examples(text: str) -> str:
    """The text below a command's options, its lines kept as they are."""
    # \b keeps click from rewrapping the lines; it asks for that in each paragraph
    return "\n\n".join("\b\n" + paragraph for paragraph in text.split("\n\n"))


MOST_SEEDS = 1_000_000
PROMPTS = "Built-in prompt set, or a file or shards of prompts, as for data.prompts."


def prompts_of(source: str | None, settings: Sequence[str]) -> list[str]:
    """The prompts of `--prompts`; none if it is not given. settings: KEY=VALUE, of which data.column counts here."""
    if source is None:
        return []
    from draftplus.config import load_config, refuse_nobodys_home
    from draftplus.data import prompts
    from draftplus.progress import progress

    refuse_nobodys_home("--prompts", source)

    column = [text for text in settings if text.startswith("data.column=")]
    with progress("reading prompts", None):
        return prompts.read_prompts(source, load_config(None, column).data.column)


def identity(target: str) -> str:
    """A target by its place, where it has one: runs of two sweeps may have one name."""
    path, at, step = target.partition("@")
    return f"{Path(path).resolve()}{at}{step}" if Path(path).exists() else target


def read_seeds(text: str) -> list[int]:
    """The seeds of `--seeds`, each once. Raises UserError for anything else."""
    first, colon, end = text.partition(":")
    try:
        given = range(int(first), int(end)) if colon else [int(part) for part in text.split(",")]
        if len(given[: MOST_SEEDS + 1]) > MOST_SEEDS:
            raise UserError(f"--seeds '{text}': more than {MOST_SEEDS:,} seeds; give fewer, such as 0:16")
        seeds = list(given)
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UserError(f"--seeds '{text}': give one or more seeds, such as 7, 0:16 or 1,5,9")
    return list(dict.fromkeys(seeds))
