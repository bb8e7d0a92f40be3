"""Rewards: each is a callable `(images, prompts) -> scores` with a `differentiable` flag, made by a `load_*` function.

Every loader has one signature, `load_x(path, args, device, dtype) -> Reward`, so that a name in a recipe resolves
through one dict.
"""
