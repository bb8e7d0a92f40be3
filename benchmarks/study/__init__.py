"""The study behind docs/results.md: diversity at equal reward of every method, over many training seeds."""
