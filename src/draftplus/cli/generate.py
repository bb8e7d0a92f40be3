"""`draftplus generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftplus.cli.shared import PROMPTS, Anneal, LoraScale, Trust, examples, identity, prompts_of, read_seeds
from draftplus.errors import UserError

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus generate emoji --prompt 'a cat' --prompt 'a fox' --seeds 0:8\n"
    "  draftplus generate runs/demo@best --prompts prompts.txt --reward emoji_clip -o pictures\n"
    "  draftplus generate runs/demo --prompt 'a cat' --lora-scale 0.5 sampler.steps=25"
)


def generate(
    target: Annotated[str, typer.Argument(metavar="MODEL|RUN[@step|@best]", help="Model or run to sample from.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as sampler.steps=25.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help=PROMPTS)] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Seeds to use for every prompt: 7, 0:16 (0 to 15) or 1,5,9.")
    ] = "0:4",
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Trained weights to use instead of the run's: a LoRA file, or a directory."),
    ] = None,
    lora_scale: LoraScale = 1.0,
    anneal: Anneal = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="A reward to score the images with; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Directory for the images. Default: generated/NAME, after the target and the settings.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Generate images from a model or run. With --reward, they are also scored."""
    chosen = list(dict.fromkeys([*(prompt or []), *prompts_of(prompts, settings or [])]))
    if not chosen:
        raise UserError("no prompt given; add --prompt 'a cat' or --prompts FILE")
    numbers = read_seeds(seeds)
    from draftplus import api
    from draftplus.cli.output import knobs, output_directory, record

    given = knobs(settings or [], adapter=adapter, anneal=anneal, lora_scale=None if lora_scale == 1 else lora_scale)
    asked = {"target": identity(target), "prompts": chosen, "seeds": numbers, "rewards": reward or [], **given}
    name = Path(target.replace("@", "-")).name or Path(target).resolve().name
    directory = output or output_directory("generated", name, given, asked, "images.jsonl")

    rows = api.write_images(
        directory, target, chosen, numbers, settings or [], adapter, lora_scale, anneal, reward or [], trust
    )
    if output is None:
        record(directory, asked)
    for key in [key for key in rows[0] if key.startswith("reward/")]:
        scores = [row[key] for row in rows]
        print(f"{key.removeprefix('reward/')}: mean {sum(scores) / len(scores):.4f} over {len(scores)} images")
    print(f"{len(rows)} images: {directory}\ngrid:     {directory / 'grid.png'}")
