"""`draftplus data`: prompts are packed and looked at."""

from __future__ import annotations

import typer

from draftplus.cli.data import pack, show
from draftplus.cli.shared import examples

app = typer.Typer(
    rich_markup_mode=None,
    help="Pack prompts for training, and look at what is in a set.",
    no_args_is_help=True,
    epilog=examples("Example:\n  draftplus data pack prompts.txt -o prompts\n  draftplus data show prompts"),
)
app.command(epilog=pack.EXAMPLES)(pack.pack)
app.command(epilog=show.EXAMPLES)(show.show)
