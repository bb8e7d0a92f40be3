"""A sweep of one run that waits to be killed: python -m tests.sweeps.killed DIRECTORY."""

import sys
from pathlib import Path

from draftplus.sweeps import launch
from draftplus.sweeps.plan import plan_sweep

if __name__ == "__main__":
    launch.COMMAND = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
    launch.run_sweep(plan_sweep("emoji", {"seed": ["3"]}, "s", Path(sys.argv[1])))
