"""How long a large sweep takes until its first run trains: 100 runs on 200,000 prompts. Linux only.

    python -m benchmarks.sweep_start
    python -m benchmarks.sweep_start --prompts 1000000 --runs 1000

The sweep is stopped once its first run has written its configuration, which it does when its model, rewards and
prompts are ready for the first step. Seconds are of the clock, and, since a busy machine delays that, of a processor:
of the sweep's own process, which plans, and of the first run.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.prompts import STEP, write_prompts

TARGET = 10.0  # seconds


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        prompts = here / "prompts.txt"
        write_prompts(prompts, options.prompts)
        seeds = f"seed={','.join(map(str, range(options.runs)))}"
        began = time.perf_counter()
        sweep = subprocess.Popen(
            [sys.executable, "-m", "draftplus", "sweep", "emoji", seeds, f"data.prompts={prompts}", *STEP,
             "--name", "large"],
            cwd=here, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        planned = None
        while not any((here / "sweeps" / "large").glob("*/config.yaml")):
            if planned is None and (here / "sweeps" / "large" / "manifest.json").is_file():
                planned = time.perf_counter() - began
            if sweep.poll() is not None:
                raise RuntimeError("the sweep ended before its first run began")
            time.sleep(0.01)
        started = time.perf_counter() - began
        sweep.send_signal(signal.SIGINT)
        sweep.wait()
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    fits = "within" if started <= TARGET else "OVER"
    print(f"{options.runs} runs on {options.prompts:,} prompts are planned after {planned or started:.1f} s")
    print(f"the first one is ready to train after {started:.1f} s: {fits} {TARGET:g} s")
    print(f"{spent.ru_utime + spent.ru_stime:.1f} s of a processor until both have ended")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=100)
    main(parser.parse_args())
