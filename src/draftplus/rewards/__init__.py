"""Rewards: each is a callable `(images, prompts) -> scores` with a `differentiable` flag, made by a `load_*` function.

The signature of a loader is what a recipe may set: each of `args` as a keyword with its type and default, and `path`,
`device` and `dtype` if they are parameters. `arguments.bind` checks a recipe against it.
"""
