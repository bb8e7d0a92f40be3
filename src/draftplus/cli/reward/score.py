"""`draftplus reward score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from draftplus.cli.shared import examples
from draftplus.errors import UserError, printable
from draftplus.runs.rows import REWARD

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus reward score pictures --reward pickscore --prompt 'a cat'\n"
    "  draftplus reward score a.png b.jpg shard.tar --reward clip_score --reward jpeg_compressibility -o scores.json\n"
    "  draftplus reward score generated/demo --prompts generated/demo/images.jsonl --reward emoji_clip --json\n"
    "  draftplus reward score pictures --reward clip_score reward.clip_score.path=my_clip --prompts prompts.txt\n"
    "  draftplus reward score --pairs pairs.jsonl --reward pickscore --reward clip_score"
)
MOST_ROWS = 100  # in the table; all are in the file


def score(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGETS|KEY=VALUE",
            help="Pictures: files, directories and .tar files; settings, such as reward.clip_score.path=my_clip.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="A reward to score with; may be repeated.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="File of prompts: in the order of the pictures, or, where it has a field file, file_name, image, name "
            "or key, by the pictures' names. Default: the .txt file beside each picture.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt for all pictures.")] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Pairs of pictures instead of TARGETS: which of two wins, by each reward."),
    ] = None,
    skip: Annotated[
        int, typer.Option("--skip", help="How many pictures that cannot be decoded are skipped before it is an error.")
    ] = 10,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File for all scores: .json, or .jsonl with one object per picture."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score pictures on disk, or say which of two is better, by any rewards."""
    settings = [text for text in arguments or [] if "=" in text and not Path(text).exists()]
    targets = [text for text in arguments or [] if text not in settings]
    from draftplus import api

    if skip < 0:
        raise UserError(f"--skip is {skip}; it must be at least 0")
    if pairs is not None and (targets or prompts is not None or prompt is not None):
        raise UserError("--pairs FILE names pictures and captions itself; leave out TARGETS, --prompts and --prompt")
    if pairs is not None:
        told = api.score_pairs(pairs, reward or [], settings, skip, output)
    else:
        told = api.score(targets, reward or [], settings, prompts, prompt, skip, output)
    if as_json:
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        (print_scores if pairs is None else print_pairs)(told)
        if output is not None:
            print(f"all scores: {output}")
    refuse_not_finite(told)


def refuse_not_finite(told: dict[str, Any]) -> None:
    """Raises UserError for the first reward whose score of a picture is not finite; the table has said the rest."""
    for name, one in told["rewards"].items():
        pictures = one["not_finite"]
        if pictures:
            raise UserError(
                f"reward '{name}' is not finite for {len(pictures)} pictures, such as {pictures[0]}; check what it "
                "returns for images in [0, 1]"
            )


def print_scores(told: dict[str, Any]) -> None:
    """Prints the scores of each picture, where these are not too many, and each reward's mean and range."""
    rows, rewards = told["pictures"], told["rewards"]
    if len(rows) <= MOST_ROWS:
        print_table(
            ["", *rewards, "prompt"],
            [[row["file"], *(_number(row[REWARD + name]) for name in rewards), row["prompt"]] for row in rows],
        )
        print()
    columns = {"mean": "mean", "deviation": "standard_deviation", "lowest": "lowest", "highest": "highest"}
    print_table(
        ["", *columns], [[name, *(_number(one[key]) for key in columns.values())] for name, one in rewards.items()]
    )
    print(f"{len(rows)} pictures")
    print_skipped(told)
    if told["left_out"]:
        print(f"{len(told['left_out'])} left out, which --prompts does not name: {', '.join(told['left_out'][:3])}")


def print_pairs(told: dict[str, Any]) -> None:
    """Prints both scores of each pair, where these are not too many, and how often each wins."""
    rows, rewards = told["pairs"], told["rewards"]
    if len(rows) <= MOST_ROWS:
        print_table(
            ["", *rewards, "label", "prompt"],
            [
                [row["pair"], *(_compared(row[REWARD + name]) for name in rewards), _number(row["label"], "-"),
                 row["caption"]]
                for row in rows
            ],
        )  # fmt: skip
        print()
    counts = {"first wins": "first_wins", "second wins": "second_wins", "ties": "ties"}
    print_table(
        ["", *counts, "accuracy"],
        [[name, *(str(one[key]) for key in counts.values()), _accuracy(one)] for name, one in rewards.items()],
    )
    print(f"{len(rows)} pairs")
    print_skipped(told)


def _compared(scores: list[float | None]) -> str:
    first, second = scores
    sign = "?" if first is None or second is None else ">" if first > second else "<" if first < second else "="
    return f"{_number(first)} {sign} {_number(second)}"


def _accuracy(one: dict[str, Any]) -> str:
    if one["accuracy"] is None:
        return "no labels"
    return f"{one['accuracy']:.3f} ± {one['standard_error']:.3f} over {one['labelled']} labels that are no ties"


def print_skipped(told: dict[str, Any]) -> None:
    """Names the pictures that could not be read."""
    for one in told["skipped"]:
        print(printable(f"skipped {one['file']}: {one['reason']}"))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Prints a table whose first column is of names, and whose others are of numbers, but for prompts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="left" if name in ("", "prompt") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # as wide as needed: a terminal wraps a line that is too long, whereas rich would cut the numbers off
    Console(width=max(sum(len(cell) + 2 for cell in row) for row in [header, *rows]) + 200).print(table)


def _number(value: float | None, absent: str = "not finite") -> str:
    return absent if value is None else f"{value:.4f}"
