"""`draftplus plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import Trust, examples

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus plan sdxl_pickscore --memory 24GB\n"
    "  draftplus plan sd15 train.micro_batch_size=4 model.gradient_checkpointing=false --memory 16GB\n"
    "  draftplus plan emoji --gpus 4"
)


def plan(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|RUN", help="Recipe name, YAML file, or run. Default: emoji."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override the recipe, as for train."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of one device, such as 24GB.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="How many GPUs run it, each with a process.")] = 1,
    trust: Trust = False,
) -> None:
    """Say what a run takes in memory, before any weight is loaded, and what to switch on where it does not fit."""
    if target and "=" in target and not Path(target).exists():
        settings = [target, *(settings or [])]
        target = None
    from draftplus import api
    from draftplus.planning.wording import told

    print(told(api.plan(target or "emoji", settings or [], memory, gpus, trust)))
