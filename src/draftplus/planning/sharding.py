"""What a process needs whose denoiser is spread over several, reckoned from what it needs alone.

As `distributed.sharding` does it, by PyTorch's `fully_shard`: every process keeps an equal part of each weight of the
denoiser, and of what full fine-tuning adds to it. A block's weights are gathered whole for as long as it computes,
those of the next one beside them, and what is in no block while the denoiser does. So it is with the decoder, and with
what is divisible of a reward, where they are large. Adapters, which are small, are whole on every process, and so are
text encoders and the rest of autoencoder and rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.config import Config
from draftplus.config.sizes import shard_frozen_above
from draftplus.distributed.sharding import large, layers
from draftplus.errors import UserError
from draftplus.planning.measure import Memory, offloads
from draftplus.planning.meter import storages
from draftplus.planning.subject import Subject

TOGETHER = 2  # blocks that are whole at once: that of a pass and the one that is fetched ahead


@dataclass(frozen=True)
class Blocks:
    """Bytes of a network's weights: of the largest block, and of all that is in none. wide: in at least float32."""

    largest: int
    rest: int
    wide: bool = False

    @property
    def gathered(self) -> int:
        """Whole at once, at most."""
        return self.rest + TOGETHER * self.largest


def blocks_of(network: nn.Module, blocks: Sequence[nn.Module], wide: bool) -> Blocks:
    """blocks: parts of the network, some within others; adapters are left out."""
    chosen = set(blocks)

    def own(module: nn.Module) -> list[Tensor]:
        found: list[Tensor] = [*module.parameters(recurse=False)]
        for name, child in module.named_children():
            if child not in chosen and not name.startswith("lora_"):
                found += own(child)
        return found

    def size(tensors: Sequence[Tensor]) -> int:
        return sum(
            one.numel() * (torch.promote_types(one.dtype, torch.float32) if wide else one.dtype).itemsize
            for one in tensors
        )

    return Blocks(max((size(own(one)) for one in chosen), default=0), size(own(network)), wide)


def frozen_parts(run: Subject) -> dict[str, list[nn.Module]]:
    """The networks besides the denoiser that are shared, by the part of the memory that they are of."""
    bound = shard_frozen_above(run.config.parallel)
    rewards = [getattr(reward, "divisible", ()) for reward in run.rewards.values()]
    return {
        "autoencoder": [run.model.decoder] if large([run.model.decoder], bound) else [],
        "rewards": [network for networks in rewards if large(networks, bound) for network in networks],
    }


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def spreads(config: Config) -> bool:
    """Whether training with `parallel.mode=shard` takes what is configured otherwise."""
    return config.model.quantize is None and (config.model.lora is not None or config.optim.name == "adamw")


def sharers(config: Config, ranks: int) -> int:
    """How many of `ranks` processes, which are of one machine, hold a denoiser together.

    Raises UserError where they cannot be divided so.
    """
    size = config.parallel.shard_size or ranks
    if ranks % size:
        raise UserError(f"parallel.shard_size is {size}, which does not divide --gpus {ranks}")
    return size


def spread(memory: Memory, run: Subject, ranks: int) -> Memory:
    """The memory of one of `ranks` processes that share the denoiser. memory: with the whole of it on each."""
    if ranks == 1:
        return memory
    tuned: Any = run.model.tuned
    full = tuned.frozen is not None
    widened = memory.kept.get("widened weights", 0)
    network = tuned.denoiser
    parts = tuned.blocks(network)
    plain = blocks_of(network, parts, wide=False)
    looked_at = blocks_of(network, parts, wide=True) if widened else plain

    def gone(whole: int) -> int:
        return whole - -(-whole // ranks)

    weights, trained, kept, phases = (dict(one) for one in (memory.weights, memory.trained, memory.kept, memory.phases))
    always = gone(weights["denoiser"]) + gone(weights["frozen copy"])
    for name in ("denoiser", "frozen copy"):
        weights[name] -= gone(weights[name])
    frozen = frozen_parts(run)
    others = {part: gone(storages(networks, _is_parameter)) for part, networks in frozen.items()}
    found = [blocks_of(network, layers(network), wide=False).gathered for parts in frozen.values() for network in parts]
    once = max(found, default=0)  # one after the other
    for part, count in others.items():
        weights[part] -= count
        always += count
    weights["gathered"] = max(plain.gathered, once)
    if full:
        always += gone(trained["optimizer"]) + gone(trained["average"])
        trained = {name: count - gone(count) for name, count in trained.items()}
    kept["widened weights"] = 0  # blocks are widened as they are gathered
    summed = memory.images["share"] == memory.images["micro"]  # else gradients are whole until the last micro-batch
    less = gone(memory.trained["gradients"]) if full and summed else 0
    # the gradients of a block are whole until they are summed over the processes
    passing = looked_at.gathered + (looked_at.largest if full else 0)
    if full and run.config.objective.kl_coeff > 0:  # what is in no block of the frozen copy
        passing += plain.rest
    passing = max(passing, once)
    fixed = memory.fixed - always
    at_least = fixed + sum(kept.values()) + passing
    away = sum(others.values()) if offloads(run.config) else 0
    phases["sampling"] += plain.gathered - memory.folded - always + away  # adapters are not folded into parts
    phases["evaluation"] += once - always
    phases["step"] = max(at_least, phases["step"] - always - less - widened + passing)
    if full:
        phases["update"] = fixed + 2 * trained["gradients"]
    else:
        phases["update"] -= always
    if not memory.lazy:
        phases["embedding prompts"] -= always
    return replace(memory, weights=weights, trained=trained, kept=kept, phases=phases, fixed=fixed)
