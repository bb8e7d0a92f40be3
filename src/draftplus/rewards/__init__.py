"""Rewards: each is a callable `(images, prompts) -> scores` with a `differentiable` flag, made by a `load_*` function.

A loader says by its signature what it takes of a recipe: each of `args` as a keyword with its type and default, and
`path`, `device` and `dtype` where it names them. `arguments.bind` holds a recipe to it.
"""
