"""`draftplus report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import examples

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus report runs/demo                              one run\n"
    "  draftplus report sweeps/emoji-1a2b3c4d                  all runs of a sweep, compared\n"
    "  draftplus report runs/a runs/b eval.json -o both.html   several inputs together"
)


def report(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|SWEEP|FILE", help="Run directories, sweep directories and eval.json files."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write. Default: report.html in the run or sweep; for several inputs, here.",
        ),
    ] = None,
) -> None:
    """Write a report about one or several runs: an HTML page. A folder of figures goes next to it."""
    from draftplus.report import write_report

    print(write_report(inputs, output, figures=True))
