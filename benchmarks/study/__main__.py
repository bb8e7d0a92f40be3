"""Trains the runs of a study and prints its tables.

    python -m benchmarks.study run study --workers 2             # the same command continues
    python -m benchmarks.study tables study                      # of what is finished
    python -m benchmarks.study tables study --over seeds         # intervals as if the prompts were all there are
    python -m benchmarks.study run pilot && python -m benchmarks.study tables pilot

What docs/results.md tells is in the repository:

    python -m benchmarks.study tables study --from benchmarks/study/measured/study.tar.xz
    python -m benchmarks.study figure study --from benchmarks/study/measured/study.tar.xz -o trade-off.png
    python -m benchmarks.study pack study --digits 5 -o benchmarks/study/measured/study.tar.xz

A study is study.yaml, pilot.yaml, or a file of your own like them. Where time is short:

    python -m benchmarks.study run study --device cuda --workers 16 --until 540 --slim --pack study.tar.gz
    python -m benchmarks.study run study --device cuda --workers 16 --until 540 --slim --unpack study.tar.gz \\
        --pack more.tar.gz
    python -m benchmarks.study tables study --from more.tar.gz

What the tables favour can be tried with seeds that did not choose it:

    python -m benchmarks.study run study --only draft 'window-*' gate-50 --seeds 8:16
    python -m benchmarks.study tables study --only draft 'window-*' gate-50 --seeds 8:16
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.study.curves import OVER
from benchmarks.study.packing import opened, pack, unpack
from benchmarks.study.plan import Plan, read_plan, seeds_of, tasks_of
from benchmarks.study.pool import run_queue
from benchmarks.study.train import Training


def main(arguments: list[str] | None = None) -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not finished")
    tables = commands.add_parser("tables", help="print the tables of what is finished")
    figure = commands.add_parser("figure", help="draw what the plan names under `drawn`")
    packing = commands.add_parser("pack", help="write the finished runs' numbers to a file")
    for one in (run, tables, figure, packing):
        one.add_argument("plan", help="study, pilot, or a YAML file")
        one.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="settings by name, such as 'gate-*'")
        one.add_argument("--seeds", type=seeds_of, help="training seeds: 8 is 0 to 7, 8:16 is 8 to 15")
        one.add_argument("--directory", type=Path, help="where the runs are; sweeps/PLAN unless given")
    for one in (tables, figure, packing):
        one.add_argument("--from", type=Path, dest="source", help="a file that --pack or pack wrote, or a directory")
    for one in (tables, figure):
        one.add_argument("--over", choices=OVER, default="both", help="what intervals are over; both unless given")
    for one in (figure, packing):
        one.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png; .tar.gz or .tar.xz")
    packing.add_argument("--digits", type=int, help="of each measured number; all unless given")
    run.add_argument("--workers", type=int, default=1, help="runs that train at the same time, one thread each")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda")
    run.add_argument("--until", type=float, metavar="SECONDS", help="end after so long, with what is done by then")
    run.add_argument("--pack", type=Path, metavar="FILE", help="write the finished runs' numbers to a .tar.gz")
    run.add_argument("--unpack", type=Path, metavar="FILE", help="take up what --pack wrote elsewhere")
    run.add_argument("--slim", action="store_true", help="remove pictures and weights of finished runs")
    run.add_argument("--no-measures", action="store_true", help="no styles and Vendi scores of the pictures")
    run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over what all settings share")
    options = parser.parse_args(arguments)

    try:
        plan = read_plan(options.plan, getattr(options, "set", ()), options.only)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    directory: Path = options.directory or Path("sweeps") / Path(options.plan).stem
    if options.command == "pack":
        with opened(options.source or directory) as where:
            print(f"{options.output}: {pack(where, options.output, options.digits)} runs", file=sys.stderr)
        return
    if options.command in ("tables", "figure"):
        tell(options.command, plan, options.source or directory, options)
        return
    if options.unpack:
        unpack(options.unpack, directory)
    tasks = tasks_of(plan, directory, options.seeds or range(plan.seeds), options.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what is in flight saved, and all that is done packed
    job = Training(not options.no_measures, options.slim)
    try:
        run_queue(tasks, job, options.workers, directory / "logs", options.until, began)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if options.pack:
            print(f"{options.pack}: {pack(directory, options.pack)} runs", file=sys.stderr)


def tell(what: str, plan: Plan, source: Path, options: argparse.Namespace) -> None:
    """Prints the tables, or draws the figure."""
    from benchmarks.study.figure import draw
    from benchmarks.study.reading import read_study
    from benchmarks.study.tables import sections

    with opened(source) as where:
        try:
            made = replace(read_study(plan, where, options.seeds), over=options.over)
        except ValueError as error:
            sys.exit(f"{error}")
    if what == "figure":
        draw(made, options.output)
        return
    for section in sections(made):
        print(section, flush=True)


if __name__ == "__main__":
    main()
