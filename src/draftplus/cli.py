"""The command line: parses and prints. Starts without importing torch."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from draftplus import __version__
from draftplus.config import RewardConfig, describe_keys, recipe_names
from draftplus.errors import Interrupted, UserError

# typer brings its own copy of click in some versions, so its base class is reached through typer
CommandLineError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

LoraScale = Annotated[float, typer.Option("--lora-scale", help="Effect of the adapter: 0 base, 1 tuned.")]
Anneal = Annotated[str | None, typer.Option("--anneal", help="From base to tuned: linear, power:2 or step:0.6.")]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _epilog(text: str) -> str:
    # keeps click from rewrapping the lines; it asks for that in each paragraph
    return "\n\n".join("\b\n" + paragraph for paragraph in text.split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"draftplus {__version__}")
        raise typer.Exit


@app.callback(
    epilog=_epilog("Example:\n  draftplus train demo\n  draftplus generate runs/demo --prompt 'a cat' --seeds 0:16")
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Teach a text-to-image diffusion model what people prefer, without losing its variety (DRaFT, DRaFT+)."""


@app.command(
    epilog=_epilog(
        "Examples:\n"
        "  draftplus train                                        the embedded model and reward\n"
        "  draftplus train emoji objective.kl_coeff=0.1           DRaFT+\n"
        "  draftplus train emoji reward=my_rewards:redness        your own reward\n"
        "  draftplus train runs/emoji-1a2b3c4d train.steps=120    continue, and go further\n"
        "  torchrun --nproc_per_node=2 -m draftplus train emoji   two processes\n\n"
        f"Recipes: {', '.join(recipe_names())}\n\nKeys, with their defaults:\n{describe_keys()}"
    )
)
def train(
    target: Annotated[
        str | None, typer.Argument(metavar="RECIPE|RUN", help="Recipe, YAML file, or a run to continue.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings over the recipe.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
) -> None:
    """Fine-tune a model on a reward; the same command again continues an unfinished run."""
    if target and "=" in target:
        settings = [target, *(settings or [])]
        target = None
    from draftplus.distributed import is_main_process
    from draftplus.engine.run import plan_run

    config, run = plan_run(target, settings or [])
    if dry_run:
        from draftplus.engine.dry_run import describe

        told = describe(config, run)
        if is_main_process():
            print(told)
        return
    from draftplus import api

    api.train(config)
    if is_main_process():
        print(f"adapter: {run / 'adapter'}\nreport:  {run / 'report.html'}")


@app.command(
    epilog=_epilog(
        "Examples:\n"
        "  draftplus generate emoji --prompt 'a cat' --prompt 'a fox' --seeds 0:8\n"
        "  draftplus generate runs/demo@best --prompts prompts.txt --reward emoji_clip -o pictures\n"
        "  draftplus generate runs/demo --prompt 'a cat' --lora-scale 0.5 sampler.steps=25"
    )
)
def generate(
    target: Annotated[str, typer.Argument(metavar="MODEL|RUN[@step|@best]", help="What to sample.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as sampler.steps=25.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Built-in set, or .txt, .jsonl or .tar file.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds: 7, 0:16, or 1,5,9.")] = "0:4",
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Directory of trained weights to use.")] = None,
    lora_scale: LoraScale = 1.0,
    anneal: Anneal = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="Score with this reward; may be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the pictures go.")] = None,
) -> None:
    """Make pictures, a grid of them, and their rewards if asked."""
    chosen = list(dict.fromkeys([*(prompt or []), *_read_prompts(prompts)]))
    if not chosen:
        raise UserError("no prompt given; add --prompt 'a cat', or --prompts FILE")
    numbers = _seeds(seeds)
    directory = output or Path("generated") / Path(target.replace("@", "-")).name
    from draftplus import api
    from draftplus.distributed import pick_device
    from draftplus.engine.build import build_reward
    from draftplus.engine.evaluate import score_images
    from draftplus.engine.files import make_output
    from draftplus.engine.pictures import save_pictures
    from draftplus.engine.run import find_weights

    make_output(directory)
    config = find_weights(target, settings or []).config
    known = {**config.reward, **config.eval.rewards}
    device = pick_device(config.device)
    scorers = {name: build_reward(name, known.get(name, RewardConfig()), device) for name in reward or []}
    images = api.generate(target, chosen, numbers, settings or [], adapter, lora_scale, anneal)
    told = [text for text in chosen for _ in numbers]
    repeated = numbers * len(chosen)
    paths = save_pictures(images, told, repeated, directory)
    rows: list[dict[str, Any]] = [
        {"file": path.name, "prompt": text, "seed": seed}
        for path, text, seed in zip(paths, told, repeated, strict=True)
    ]
    scored = score_images(scorers, images, told, device) if scorers else {}
    for name, scores in scored.items():
        for row, value in zip(rows, scores.tolist(), strict=True):
            row[f"reward/{name}"] = value
        print(f"{name}: mean {scores.mean():.4f} over {len(scores)} images")
    (directory / "images.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
    )
    print(f"{len(paths)} images: {directory}\ngrid:     {directory / 'grid.png'}")


@app.command(
    epilog=_epilog(
        "Examples:\n"
        "  draftplus evaluate runs/demo                                  base and result, as during training\n"
        "  draftplus evaluate runs/demo@40 runs/demo@best --images-per-prompt 50\n"
        "  draftplus evaluate runs/demo --metric lpips --metric coverage --reward jpeg_compressibility\n"
        "  draftplus evaluate runs/demo --anneal linear --prompts my.txt sampler.steps=25 -o measured"
    )
)
def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="MODEL|RUN[@step|@best]|ADAPTER ... [KEY=VALUE ...]", help="What to measure; settings."),
    ],
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Built-in set, or .txt, .jsonl or .tar file; else held-out ones.")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option("--images-per-prompt", help="Images of each prompt; else as the run evaluates.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds for every prompt: 0:16 or 1,5,9; else each image its own.")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", help="Another reward besides the run's own; may be repeated.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="lpips, vendi, precision, recall, coverage, drift, style_entropy, style_count, style_divergence, or "
            "any reward; may be repeated.",
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="CLIPModel, directory or hub id, whose features metrics use.")
    ] = None,
    lora_scale: LoraScale = 1.0,
    anneal: Anneal = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where eval.json and pictures go.")] = None,
) -> None:
    """Measure reward and diversity of models and runs on the same prompts and seeds, beside the base model."""
    settings = [text for text in arguments if "=" in text and not Path(text.partition("@")[0]).exists()]
    targets = [text for text in arguments if text not in settings]
    if not targets:
        missing = f"; {settings[0]} is no file, and taken for a setting" if settings else ""
        raise UserError(f"no target given; name a model or a run, such as runs/demo{missing}")
    numbers = _seeds(seeds) if seeds is not None else None
    chosen = _read_prompts(prompts) if prompts is not None else None
    more = f"-and-{len(targets) - 1}-more" if len(targets) > 1 else ""
    first = Path(targets[0].replace("@", "-"))
    directory = output or Path("evaluated") / ((first.name or first.resolve().name) + more)
    from draftplus import api
    from draftplus.tables import print_evaluation

    told = api.evaluate(
        targets, settings, chosen, images_per_prompt, numbers, reward or [], metric or [], features, lora_scale,
        anneal, directory,
    )  # fmt: skip
    print_evaluation(told)
    print(f"numbers:  {directory / 'eval.json'}\npictures: {directory / 'pictures'}")


@app.command(
    epilog=_epilog(
        "Examples:\n"
        "  draftplus sweep emoji objective.kl_coeff=0,1,10 seed=0,1,2       nine runs, then the report\n"
        "  draftplus sweep emoji lora_scale=0.25,0.5 anneal=linear         knobs that need no training of their own\n"
        "  draftplus sweep emoji 'model.lora={rank:4,alpha:4},{rank:8,alpha:8}' optim.betas=[0.9,0.99] --dry-run\n"
        "  draftplus sweep trade-off.yaml                                   recipe, grid and runs from a file"
    )
)
def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="Recipe, YAML file, or a sweep file.")],
    grid: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=V1,V2,...", help="Values of a key; all are combined.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Made in sweeps/NAME; the recipe and a hash.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Runs that train at the same time; one on each GPU, or one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs, and stop.")] = False,
) -> None:
    """Train a grid of runs and compare them; the same command again continues an unfinished sweep."""
    if "=" in recipe:
        raise UserError(f"'{recipe}' stands where the recipe does; such as: draftplus sweep emoji {recipe}")
    from draftplus.sweeps.grid import parse_grid
    from draftplus.sweeps.plan import plan_sweep

    planned = plan_sweep(recipe, parse_grid(grid or []), name)
    if dry_run:
        print("\n".join(f"{run.name}  {' '.join(run.settings)}" for run in planned.runs))
        print(f"{len(planned.runs)} runs, {sum(run.steps for run in planned.runs):,} steps: {planned.directory}")
        return
    from draftplus import api
    from draftplus.sweeps.manifest import read_manifest

    page = api.run_planned(planned, jobs)
    manifest = read_manifest(planned.directory)
    assert manifest is not None
    failed = list(manifest.with_status("failed"))
    for entry in failed:
        print(f"failed: {entry.name}: {entry.error}", file=sys.stderr)
    print(
        f"{sum(1 for _ in manifest.with_status('finished'))} of {len(manifest.runs)} runs finished: {planned.directory}"
    )
    if page is not None:
        print(f"report:  {page}")
    if failed:
        sys.exit(1)


@app.command(
    epilog=_epilog(
        "Examples:\n"
        "  draftplus report runs/demo                              one run\n"
        "  draftplus report sweeps/emoji-1a2b3c4d                  all runs of a sweep\n"
        "  draftplus report runs/a runs/b eval.json -o both.html   any of them together"
    )
)
def report(
    inputs: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP ...", help="Runs, sweeps, and eval.json files.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page; report.html in the one input, else here.")
    ] = None,
) -> None:
    """Write the report of a run, or compare several: one page, and a folder of figures beside it."""
    from draftplus.report import write_report

    print(write_report(inputs, output, figures=True))


def _read_prompts(source: str | None) -> list[str]:
    if source is None:
        return []
    from draftplus.data.prompts import read_prompts

    return read_prompts(source)


def _seeds(text: str) -> list[int]:
    first, colon, end = text.partition(":")
    try:
        seeds = list(range(int(first), int(end))) if colon else [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UserError(f"--seeds '{text}': give one or more seeds, such as 7, 0:16 or 1,5,9")
    return list(dict.fromkeys(seeds))


def main() -> None:
    """Runs a command. Exit status 0 for success, 2 for a user's mistake, 1 for anything else."""
    try:
        app(sys.argv[1:] or ["--help"], prog_name="draftplus", standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except CommandLineError as error:
        _fail(f"{error.format_message().rstrip('.')}; see draftplus --help")
    except (Interrupted, typer.Abort, KeyboardInterrupt):
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _fail(message: str) -> None:
    print(f"draftplus: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
