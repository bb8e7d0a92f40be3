"""`python -m draftplus`, which `torchrun -m draftplus` needs."""

import sys

if not sys.flags.safe_path:  # -m puts the working directory first, where a queue.py would stand in for Python's own
    sys.path.pop(0)

from draftplus.cli import main

main()
