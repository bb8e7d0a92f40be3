"""A sweep of one run that waits to be killed: python -m tests.sweeps.killed DIRECTORY."""

import sys
from pathlib import Path

from draftplus.sweeps import local
from draftplus.sweeps.launch import run_sweep
from draftplus.sweeps.plan import plan_sweep

if __name__ == "__main__":
    local.COMMAND = (sys.executable, str(Path(__file__).with_name("stand_in.py")))
    planned = plan_sweep("emoji", {"seed": ["3"]}, "s", Path(sys.argv[1]))
    run_sweep(planned, local.LocalRunner(planned, None))
