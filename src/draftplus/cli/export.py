"""`draftplus export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import examples

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus export runs/demo                              adapter and model card, ready for a model hub\n"
    "  draftplus export runs/demo@best --format kohya          for ComfyUI, AUTOMATIC1111, Forge, InvokeAI\n"
    "  draftplus export runs/demo --format merged -o my-model  a whole pipeline with the adapter merged in"
)


def export(
    target: Annotated[str, typer.Argument(metavar="RUN[@step|@best]", help="Run whose weights to export.")],
    form: Annotated[
        str, typer.Option("--format", help="diffusers, kohya (ComfyUI and others) or merged (a whole pipeline).")
    ] = "diffusers",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to write. Default: RUN/export/FORMAT.")
    ] = None,
) -> None:
    """Export trained weights for other programs, with a model card."""
    from draftplus import api

    directory = api.export(target, form, output)
    print("\n".join(str(path) for path in sorted(directory.iterdir())))
