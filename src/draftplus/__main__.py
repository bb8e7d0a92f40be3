"""`python -m draftplus`, which `torchrun -m draftplus` needs."""

from draftplus.cli import main

main()
