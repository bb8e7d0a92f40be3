"""The mathematics: schedules, solvers, windows, the sampler, methods and regularisers. Imports torch only."""
