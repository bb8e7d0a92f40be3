"""A grid of runs: what is in it, which of them are done, and the processes that train them."""
