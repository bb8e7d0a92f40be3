"""`draftplus sweep`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from draftplus.cli.shared import Trust, examples
from draftplus.errors import UserError, printable

if TYPE_CHECKING:
    from draftplus.sweeps.ahead import Ahead
    from draftplus.sweeps.slurm_options import SlurmOptions

EXAMPLES = examples(
    "Examples:\n"
    "  draftplus sweep emoji objective.kl_coeff=0,1,10 seed=0,1,2       nine runs, then the report\n"
    "  draftplus sweep emoji lora_scale=0.25,0.5 anneal=linear          knobs, which need no training of their own\n"
    "  draftplus sweep emoji 'model.lora={rank:4,alpha:4},{rank:8,alpha:8}' optim.betas=[0.9,0.99] --dry-run\n"
    "  draftplus sweep trade-off.yaml                                   recipe, grid and runs from a file\n"
    "  draftplus sweep emoji seed=0,1,2 --slurm partition=gpu,time=2:00:00,gpus=1   each run is a job of a cluster"
)


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="Recipe name, recipe file or sweep file.")],
    grid: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=V1,V2,...", help="Values of a key; each combination is one run.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="Directory for the sweep, below sweeps/. Default: RECIPE-HASH, or the sweep file's name."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Runs to train at the same time. Default: one per GPU, or one; with --slurm, all."),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            "--slurm",
            metavar="KEY=VALUE,...",
            help="Train each run as a Slurm job with these options: partition, time, nodes, gpus, cpus, account, "
            "grace, or any of sbatch's. An empty text leaves all to the cluster.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs, and stop.")] = False,
    trust: Trust = False,
) -> None:
    """Train a grid of runs and compare them. Repeat the command to continue an unfinished sweep."""
    if "=" in recipe:
        raise UserError(f"'{recipe}' is where the recipe should be; for example: draftplus sweep emoji {recipe}")
    from draftplus.sweeps.grid import parse_grid
    from draftplus.sweeps.slurm_options import read_options

    cells, options = parse_grid(grid or []), read_options(slurm) if slurm is not None else None
    if dry_run or options is not None:
        _sweep(recipe, cells, name, jobs, options, dry_run, trust)
        return
    from draftplus.sweeps.ahead import ready_ahead
    from draftplus.sweeps.local import environment

    with ready_ahead(environment({})) as ahead:
        _sweep(recipe, cells, name, jobs, options, dry_run, trust, ahead)


def _sweep(
    recipe: str, cells: dict[str, list[str]], name: str | None, jobs: int | None, options: SlurmOptions | None,
    dry_run: bool, trust: bool, ahead: Ahead | None = None,
) -> None:  # fmt: skip
    from draftplus.config import trusting
    from draftplus.sweeps.plan import plan_sweep

    with trusting(trust):
        planned = plan_sweep(recipe, cells, name)
    if dry_run:
        print("\n".join(printable(f"{run.name}  {' '.join(run.settings)}") for run in planned.runs))
        print(f"{len(planned.runs)} runs, {sum(run.steps for run in planned.runs):,} steps: {planned.directory}")
        if options is not None:
            print(printable(f"each is a Slurm job: sbatch {' '.join(options.flags)}"))
        return
    from draftplus import api
    from draftplus.sweeps.manifest import read_manifest

    page = api.run_planned(planned, jobs, options, ahead)
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
