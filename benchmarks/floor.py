"""The bare passes of an optimizer step of any family, recorded while the step is taken and made again by themselves.

What is recorded are the calls of the denoiser, the decoder and the reward's network, with what they were given. The
floor calls the same networks with the same inputs, under no_grad where the step did so, and then differentiates all
that carried gradient in one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from draftplus.build import build_problem
from draftplus.config import Config
from draftplus.diffusion.objectives import plan
from draftplus.distributed import World
from draftplus.models import lora
from draftplus.training.placement import Replicated
from draftplus.training.state import State, initial_state
from draftplus.training.step import Setup, gradient_step, precisely


@dataclass(frozen=True)
class Pass:
    """A call of a network: with gradient or without, with adapters on or off."""

    network: str
    call: Callable[..., Any]
    given: tuple[tuple[Any, ...], dict[str, Any]]
    gradient: bool
    adapters: bool


def training(config: Config, model: Any, rewards: Mapping[str, Any]) -> tuple[Setup, State]:
    """What training needs for its steps, on the model's device. All steps are of the same prompts, embedded once."""
    here = World(0, 1, model.device)
    problem = build_problem(config, model, rewards)
    shape = model.latent_shape(config.sampler.height, config.sampler.width)
    prompts = [f"prompt {number}" for number in range(config.train.global_batch_size)]
    setup = Setup(config, problem, prompts, shape, config.train.micro_batch_size, here, Replicated(here))
    return setup, initial_state(model.tuned.trainable(), config.optim)


def take_step(setup: Setup, state: State) -> None:
    """As the loop of training does it, but for writing the row."""
    gradient_step(setup, state, nullcontext)
    state.step += 1


def recorded(setup: Setup, state: State) -> list[Pass]:
    """Takes a step, of one micro-batch, and returns its passes in order."""
    model: Any = setup.problem.model
    scorer: Any = setup.problem.scorer
    denoiser, seen = model.tuned.denoiser, []
    layer = lora.layers(denoiser)[0]
    networks = {"denoiser": (denoiser, "forward"), "vae": (model.vae.decoder, "forward")}
    ((reward, _),) = scorer.rewards.values()
    networks["reward"] = (reward.model, "get_image_features")
    with ExitStack() as stack:
        for name, (network, method) in networks.items():

            def note(call: Callable[..., Any], given: Any, name: str = name) -> None:
                inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, given)
                seen.append(Pass(name, call, inputs, torch.is_grad_enabled(), not layer._disable_adapters))

            stack.enter_context(_spied(network, method, note))
        take_step(setup, state)
    unseen = networks.keys() - {one.network for one in seen}
    if unseen:
        raise RuntimeError(f"the step was seen to make no pass of {', '.join(unseen)}, so that its floor would lack it")
    return seen


@contextmanager
def _spied(network: Any, method: str, note: Callable[..., None]) -> Iterator[None]:
    original = getattr(network, method)
    called = network if method == "forward" else original

    def spy(*args: Any, **keywords: Any) -> Any:
        note(called, (args, keywords))
        return original(*args, **keywords)

    setattr(network, method, spy)
    try:
        yield
    finally:
        delattr(network, method)


def floor(setup: Setup, passes: Sequence[Pass], dtype: torch.dtype | None = None) -> Callable[[], None]:
    """The passes of a step, a backward pass and an update, without anything around them.

    dtype: None: each pass in the precision in which the step made it. Else all passes of the denoiser in this one, that
    of its weights, though the step made those of the KL term in float32.
    """
    model: Any = setup.problem.model
    tuned, planned = model.tuned, plan(setup.problem.objective, setup.problem.sampler.schedule, setup.config.seed, 0)
    first = next(i for i, one in enumerate(passes) if one.gradient)
    if dtype is not None:
        passes = [_narrowed(one, dtype) if one.network == "denoiser" else one for one in passes]
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=0.0)
    adapted = lora.layers(tuned.denoiser)
    layers = [layer.get_base_layer() for layer in adapted]
    folds = any(not one.adapters for one in passes[:first])
    with tuned.folded() if folds else nullcontext():
        merged = [layer.weight.data for layer in layers]
    originals = [layer.weight.data for layer in layers]

    def put(weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(layers, weights, strict=True):
            if folds:  # else `widened` may have replaced them
                layer.weight.data = weight

    def made(one: Pass) -> list[Tensor]:
        """What carries gradient of a pass' results. The denoiser's comes from its adapters, not from its input."""
        args, keywords = one.given if one.network == "denoiser" else tree_map(_leaf, one.given)
        for layer in adapted:
            layer._disable_adapters = not one.adapters
        with torch.set_grad_enabled(one.gradient):
            return [x for x in tree_leaves(one.call(*args, **keywords)) if isinstance(x, Tensor) and x.requires_grad]

    def run() -> None:
        put(merged)
        for one in passes[:first]:
            made(one)
        put(originals)
        with nullcontext() if dtype is not None else precisely(setup, planned):
            results = [x for one in passes[first:] for x in made(one)]
            for layer in adapted:
                layer._disable_adapters = False
            torch.autograd.backward(results, [torch.ones_like(x) for x in results])
        optimizer.step()
        optimizer.zero_grad()

    return run


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _narrowed(one: Pass, dtype: torch.dtype) -> Pass:
    return replace(
        one, given=tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, one.given)
    )
