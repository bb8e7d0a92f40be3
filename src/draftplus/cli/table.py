"""What `draftplus evaluate` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_evaluation(told: dict[str, Any]) -> None:
    """Every target's metrics with their standard errors, and what changed from the base model."""
    rows = told["targets"]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in rows[0]["metrics"]:
        table.add_column(name.removeprefix("reward/"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["label"], *(shown(number) for number in row["metrics"].values()))
    # as wide as needed: a terminal wraps a line that is too long, whereas rich would cut the numbers off
    Console(width=40 + 40 * len(table.columns)).print(table)
    images, prompts = len(told["seeds"]), len(told["prompts"])
    print(
        f"mean ± standard error over {images} images of {prompts} prompts; "
        "in brackets, the paired change from the base model"
    )


def shown(number: dict[str, Any]) -> str:
    """A metric as mean ± standard error, and what changed from the base model, in brackets."""

    def plain(mean: float, error: float | None, sign: str = "") -> str:
        return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")

    told = plain(number["mean"], number["standard_error"])
    change = number.get("change")
    return f"{told} ({plain(change['mean'], change['standard_error'], '+')})" if change else told
