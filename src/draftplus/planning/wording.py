"""A plan in words."""

from __future__ import annotations

from collections.abc import Mapping

from draftplus.planning.measure import Memory
from draftplus.planning.plan import SHARD, Plan

WHOLE = 16  # characters of the first column
NOT_COUNTED = "the device's own context, workspaces of convolutions, and room that the allocator keeps"


def told(plan: Plan) -> str:
    """The text of `draftplus plan`."""
    config, memory = plan.config, plan.memory
    images = memory.images
    on = config.model.gradient_checkpointing
    kept = {"as configured": memory, f"checkpointing {'off' if on else 'on'}": plan.other}
    plain, graded, frozen = plan.passes
    lines = [
        *_table("parameters", {name: f"{count:,}" for name, count in plan.parameters.items() if count}),
        *_table("weights", {name: size(count) for name, count in memory.weights.items() if count}),
        *_table("training", {name: size(count) for name, count in memory.trained.items() if count}),
        f"kept for the backward pass of {images['micro']} images",
        *(line for name, one in kept.items() for line in _kept(name, one)),
        *_table("the most at once", {name: size(count) for name, count in memory.phases.items()}),
        f"  {'peak':<{WHOLE}} {size(memory.peak)}, in {memory.fullest}; "
        f"{size(plan.other.peak)} with gradient checkpointing {'off' if on else 'on'}",
        f"batches           micro-batches of {images['micro']}, sampling of {images['sampling']}, "
        f"{images['share']} images of a step" + (f" on each of {plan.ranks} GPUs" if plan.ranks > 1 else ""),
        f"passes per image  {plain} without gradient, {graded} with gradient, {frozen} of the frozen model"
        + (", each doubled by guidance" if plan.doubled else ""),
        *_fit(plan),
        *_gpus(plan),
        *_reckoned(plan),
        *(
            [f"not counted       the networks of {', '.join(plan.uncounted)}, whose sizes are not known here"]
            if plan.uncounted
            else []
        ),
        f"not counted       {NOT_COUNTED}",
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def _table(title: str, rows: Mapping[str, str]) -> list[str]:
    return [title, *(f"  {name:<{WHOLE}} {text}" for name, text in rows.items())] if rows else []


def _kept(name: str, memory: Memory) -> list[str]:
    parts = ", ".join(f"{part} {size(count)}" for part, count in memory.kept.items() if count > 0)
    return [f"  {name:<{WHOLE}} {parts}"] if parts else []


def _fit(plan: Plan) -> list[str]:
    if plan.limit is None:
        return []
    largest = f"largest micro-batch that fits in {size(plan.limit)}: {plan.largest or 'none'}"
    if plan.fits:
        return [f"fits              {largest}, with these settings"]
    lines = [f"does not fit      it needs {size(plan.memory.peak)}; {largest}, with these settings"]
    for number, advice in enumerate(plan.advice):
        lines.append(
            f"  {'set' if number == 0 else 'and then'} {advice.setting}: {size(advice.memory.peak)} ({advice.cost})"
        )
    if not plan.fits_with_advice:
        lines.append("  and still it does not fit: lower sampler.height and sampler.width, or use a smaller model")
    return lines


def _gpus(plan: Plan) -> list[str]:
    if plan.ranks == 1:
        return []
    share, shards = plan.memory.images["share"], plan.config.parallel.mode == SHARD
    held = "a part of the denoiser" if shards else "all weights"
    lines = [
        f"{plan.ranks} GPUs".ljust(WHOLE + 2)
        + f"each holds {held} and makes {share} of the {plan.config.train.global_batch_size} images of a step"
    ]
    if plan.elsewhere is not None:
        other = f"parallel.mode={'replicate' if shards else 'shard'}"
        lines.append(
            " " * (WHOLE + 2) + f"with {other} the peak is {size(plan.elsewhere.peak)}, in {plan.elsewhere.fullest}"
        )
    return lines


def _reckoned(plan: Plan) -> list[str]:
    """What is not run as training would, but put in its place."""
    told = []
    if plan.config.model.quantize is not None:
        told.append("quantised layers, as layers of full precision whose weights are made anew in each pass")
    if plan.config.parallel.mode == SHARD and plan.ranks > 1:
        told.append("blocks that are gathered whole, from their sizes")
    return [f"reckoned          {'; '.join(told)}"] if told else []
