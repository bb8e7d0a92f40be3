"""The prompts of a whole command are embedded before anything is made of them, with the time that is left."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from draftplus.distributed import World
from draftplus.progress import Progress, progress
from draftplus.types import Model


def embed_prompts(model: Model, prompts: Sequence[str | None], here: World) -> None:
    """Embeds prompts, each process a share of them, after which large text encoders are out of memory.

    Every process calls it. Nothing is shown where the model has nothing to embed.

    Raises UserError where the prompts need more room on disk than there may be used.
    """
    distinct = list(dict.fromkeys(prompts))
    # processes that share no disk embed what they lack in the second round
    for share in dict.fromkeys([(here.rank, here.size), (0, 1)]):
        with ExitStack() as until_done:
            _prepare(model, distinct, share, here.is_main, until_done)
        here.barrier()


def _prepare(
    model: Model, prompts: Sequence[str | None], share: tuple[int, int], shows: bool, until_done: ExitStack
) -> None:
    total = len(prompts[share[0] :: share[1]])
    shown: list[Progress] = []

    def advance(done: int, note: str) -> None:
        if not shown and done < total:
            shown.append(until_done.enter_context(progress("embedding prompts", total, shows, "prompts")))
        if shown:
            shown[0](done, note)

    model.prepare(prompts, advance, share)
