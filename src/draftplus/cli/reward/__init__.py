"""`draftplus reward`: what is done with rewards alone, a file for each command."""

from __future__ import annotations

import typer

from draftplus.cli.reward import convert, score, train
from draftplus.cli.shared import examples

app = typer.Typer()


@app.callback(
    invoke_without_command=True,
    epilog=examples("Example:\n  draftplus reward score pictures --reward pickscore --prompt 'a cat'"),
)
def _root(context: typer.Context) -> None:
    """Use rewards without a diffusion model."""
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command(epilog=score.EXAMPLES)(score.score)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=convert.EXAMPLES)(convert.convert)
