"""The mathematics: schedules, solvers, windows, the sampler, the KL term and the objectives. Imports torch only."""
