"""What a process needs whose denoiser is spread over several, reckoned from what it needs alone.

As PyTorch's `fully_shard` does it: every process keeps an equal part of each weight of the denoiser, and of what full
fine-tuning adds to it. A block's weights are gathered whole for as long as its passes last, those of the next one
beside them; what is in no block is gathered whole throughout. Adapters, which are small, are whole on every process,
and so are autoencoder, text encoders and rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.errors import UserError
from draftplus.planning.measure import Memory
from draftplus.planning.subject import Subject

TOGETHER = 2  # blocks that are whole at once: that of a pass and the one that is fetched ahead


@dataclass(frozen=True)
class Blocks:
    """Bytes of a denoiser's weights: of the largest block, and of all that is in none. wide: in at least float32."""

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

    return Blocks(max(size(own(one)) for one in chosen), size(own(network)), wide)


def refuse_unspreadable(run: Subject) -> None:
    """UserError for what cannot be reckoned spread over several processes."""
    quantize = run.config.model.quantize
    if quantize is not None:
        raise UserError(
            f"parallel.mode is shard and model.quantize is {quantize}: how quantised weights are spread over several "
            "GPUs is not known, so it cannot be planned; set model.quantize=null or parallel.mode=replicate"
        )


def spread(memory: Memory, run: Subject, ranks: int) -> Memory:
    """The memory of one of `ranks` processes that share the denoiser. memory: with the whole of it on each.

    Raises UserError as `refuse_unspreadable` does.
    """
    refuse_unspreadable(run)
    if ranks == 1:
        return memory
    model: Any = run.model
    full = model.tuned.frozen is not None
    widened = memory.kept.get("widened weights", 0)
    network, parts = model.tuned.denoiser, model.blocks()
    plain = blocks_of(network, parts, wide=False)
    looked_at = blocks_of(network, parts, wide=True) if widened else plain

    def gone(whole: int) -> int:
        return whole - -(-whole // ranks)

    weights, trained, kept, phases = (dict(one) for one in (memory.weights, memory.trained, memory.kept, memory.phases))
    always = gone(weights["denoiser"]) + gone(weights["frozen copy"])
    gradients = 0
    for name in ("denoiser", "frozen copy"):
        weights[name] -= gone(weights[name])
    weights["gathered"] = plain.gathered
    if full:
        gradients = gone(trained["gradients"])
        always += gone(trained["optimizer"]) + gone(trained["average"])
        trained = {name: count - gone(count) for name, count in trained.items()}
    if widened:
        kept["widened weights"] -= gone(widened)
    # the gradients of a block are whole until they are summed over the processes
    passing = looked_at.gathered + (looked_at.largest if full else 0)
    if full and run.config.objective.kl_coeff > 0:  # what is in no block of the frozen copy
        passing += plain.rest
    phases["sampling"] += plain.gathered - gone(memory.folded) - always
    phases["evaluation"] -= always
    fixed = memory.fixed - always
    at_least = fixed + sum(kept.values()) + passing
    phases["step"] = max(at_least, phases["step"] - always - gradients - gone(widened) + passing)
    if full:
        phases["update"] = fixed + 2 * trained["gradients"]
    else:
        phases["update"] -= always
    if not memory.lazy:
        phases["embedding prompts"] -= always
    return replace(memory, weights=weights, trained=trained, kept=kept, phases=phases, fixed=fixed)
