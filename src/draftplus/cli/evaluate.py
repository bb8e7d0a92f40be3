"""`draftplus evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from draftplus.cli.shared import PROMPTS, Anneal, LoraScale, Trust, examples, identity, prompts_of, read_seeds
from draftplus.errors import UserError, printable
from draftplus.runs.rows import REWARD, MetricRow, read_target

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus evaluate runs/demo                                  base model and result, as during training\n"
    "  draftplus evaluate runs/demo@40 runs/demo@best --images-per-prompt 50\n"
    "  draftplus evaluate runs/demo --metric lpips --metric coverage --reward jpeg_compressibility\n"
    "  draftplus evaluate runs/demo --anneal linear --prompts my.txt sampler.steps=25 -o measured"
)


def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|RUN|ADAPTER|KEY=VALUE",
            help="Models, runs (also RUN@step, RUN@best) and adapters (LoRA files, directories) to measure; settings, "
            "such as sampler.steps=25.",
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help=f"{PROMPTS} Default: the held-out prompts."),
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option("--images-per-prompt", help="Images per prompt. Default: as in the run.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            help="Seeds to use for every prompt: 0:16 (0 to 15) or 1,5,9. Default: a different seed for each image.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option("--reward", help="A reward to measure in addition to those of the run; may be repeated."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="A metric: lpips, vendi, precision, recall, coverage, drift, style_entropy, style_count, "
            "style_divergence, or any reward; may be repeated.",
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="CLIP model whose features the metrics use: a directory or hub id.")
    ] = None,
    lora_scale: LoraScale = 1.0,
    anneal: Anneal = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Directory for eval.json and the images. Default: evaluated/NAME, after the target and the settings.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Measure reward and diversity of models and runs. All use the same prompts and seeds as the base model."""
    settings = [text for text in arguments if "=" in text and not Path(text.rpartition("@")[0] or text).exists()]
    targets = [text for text in arguments if text not in settings]
    if not targets:
        missing = f" ({settings[0]} does not exist, so it was read as a setting)" if settings else ""
        raise UserError(f"no target given; name a model or a run, such as runs/demo{missing}")
    numbers = read_seeds(seeds) if seeds is not None else None
    chosen = prompts_of(prompts, settings) if prompts is not None else None
    more = f"-and-{len(targets) - 1}-more" if len(targets) > 1 else ""
    first = Path(targets[0].replace("@", "-"))
    from draftplus import api
    from draftplus.cli.output import knobs, output_directory, record

    scale = None if lora_scale == 1 else lora_scale
    given = knobs(
        settings, prompts=prompts, images_per_prompt=images_per_prompt, seeds=seeds, reward=reward, metric=metric,
        features=features, lora_scale=scale, anneal=anneal,
    )  # fmt: skip
    name, asked = (first.name or first.resolve().name) + more, {"targets": [*map(identity, targets)], **given}
    directory = output or output_directory("evaluated", name, given, asked, "eval.json")
    told = api.evaluate(
        targets, settings, chosen, images_per_prompt, numbers, reward or [], metric or [], features, lora_scale,
        anneal, directory, None if output else Path("evaluated") / name / "latents", trust,
    )  # fmt: skip
    if output is None:
        record(directory, asked)
    print_evaluation(told)
    print(f"numbers:  {directory / 'eval.json'}\npictures: {directory / 'pictures'}")


def print_evaluation(told: dict[str, Any]) -> None:
    """Prints every target's metrics with their standard errors and their changes from the base model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [read_target(target) for target in told["targets"]]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in rows[0].metrics:
        table.add_column(name.removeprefix(REWARD), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(printable(row.label)), *(shown(metric) for metric in row.metrics.values()))
    # as wide as needed: a terminal wraps a line that is too long, whereas rich would cut the numbers off
    Console(width=40 + 40 * len(table.columns)).print(table)
    images, prompts = len(told["seeds"]), len(told["prompts"])
    print(
        f"mean ± standard error over {images} images of {prompts} prompts; "
        "in brackets, the paired change from the base model"
    )


def shown(metric: MetricRow) -> str:
    """A metric as mean ± standard error, with its change from the base model in brackets."""

    def plain(mean: float | None, error: float | None, sign: str = "") -> str:
        if mean is None or not math.isfinite(mean):
            return "not finite"
        return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")

    told, change = plain(metric.mean, metric.standard_error), metric.change
    return f"{told} ({plain(change.mean, change.standard_error, '+')})" if change else told
