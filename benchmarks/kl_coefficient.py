"""What the KL coefficient does: a grid of runs over coefficients, seeds and timestep spacings, and its table.

    python benchmarks/kl_coefficient.py optim.lr=2e-3 --coefficients 1 10 100 --seeds 0 1 --spacings trailing leading

Each run continues where it was stopped, and a finished one is not repeated. The table has, over seeds, the mean KL of
the last quarter of the training steps, and the held-out reward and LPIPS of the last evaluation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import draftplus
from draftplus.runs.journal import read_rows
from draftplus.runs.rows import read_held_out


def measure(run: Path) -> dict[str, float]:
    """The numbers of one finished run."""
    steps, evaluations = read_rows(run / "metrics.jsonl"), read_rows(run / "eval.jsonl")
    late = [row["kl"] for row in steps[-max(1, len(steps) // 4) :]]
    base, last = (read_held_out(row) for row in (evaluations[0], evaluations[-1]))
    return {
        "KL": mean(late),
        "reward": last.rewards["emoji_clip"],
        "gain": last.rewards["emoji_clip"] - base.rewards["emoji_clip"],
        "LPIPS": last.lpips,
        "LPIPS / base": last.lpips / base.lpips,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coefficients", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--spacings", nargs="+", default=["trailing", "leading"])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--output-dir", default="runs/kl_coefficient")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE for every run")
    options = parser.parse_args()
    for spacing in options.spacings:
        print(f"\nspacing {spacing}: mean ± standard deviation over seeds {options.seeds}")
        for coefficient in options.coefficients:
            runs = [
                draftplus.train(
                    options.recipe,
                    [
                        *options.settings,
                        f"output_dir={options.output_dir}",
                        f"name={spacing}-kl{coefficient:g}-seed{seed}",
                        f"sampler.spacing={spacing}",
                        f"objective.kl_coeff={coefficient}",
                        f"seed={seed}",
                    ],
                )
                for seed in options.seeds
            ]
            measured = [measure(run) for run in runs]
            cells = []
            for key in measured[0]:
                values = [one[key] for one in measured]
                cells.append(f"{key} {mean(values):.4g} ± {stdev(values) if len(values) > 1 else 0:.2g}")
            print(f"  kl_coeff {coefficient:<6g} " + "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
