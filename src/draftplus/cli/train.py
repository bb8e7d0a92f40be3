"""`draftplus train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.failures import plannable
from draftplus.cli.shared import Trust, examples
from draftplus.config import describe_keys, recipe_names

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus train                                        recipe emoji: the embedded model and reward\n"
    "  draftplus train emoji objective.kl_coeff=0.1           DRaFT+\n"
    "  draftplus train emoji reward=my_rewards:redness        your own reward\n"
    "  draftplus train runs/emoji-1a2b3c4d train.steps=120    continue a run and train longer\n"
    "  torchrun --nproc_per_node=2 -m draftplus train emoji   two processes\n\n"
    f"Recipes: {', '.join(recipe_names())}\n\nKeys, with their defaults:\n{describe_keys()}"
)


def train(
    target: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|RUN", help="Recipe name, YAML file, or run to continue. Default: emoji."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that override the recipe; all keys are listed below."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Take one trial step, print what to expect, and stop.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Fine-tune a model on a reward. Repeat the command to continue an unfinished run."""
    if target and "=" in target and not Path(target).exists():
        settings = [target, *(settings or [])]
        target = None
    from draftplus import api
    from draftplus.launcher import is_main_process

    recipe = target or "emoji"
    with plannable(recipe, settings or []):
        if dry_run:
            told = api.describe(recipe, settings or [], trust)
        else:
            run = api.train(recipe, settings or [], trust)
            told = f"adapter: {run / 'adapter'}\nreport:  {run / 'report.html'}"
    if is_main_process():
        print(told)
