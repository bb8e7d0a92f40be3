"""Prompts that are longer than a text encoder reads: the stock pipelines cut them, and the user should know."""

from __future__ import annotations

from collections.abc import Mapping

from draftplus.errors import notice

Cuts = Mapping[str, tuple[int, int]]  # encoder -> (tokens of a prompt, how many of them are read)


def tell_of_one(prompt: str | None, cuts: Cuts) -> None:
    """Says that a prompt is cut, and that others may be."""
    for encoder, (tokens, limit) in cuts.items():
        notice(
            f"a prompt has {tokens} tokens, and {encoder} reads the first {limit}; its end, and that of other long "
            f"prompts, has no effect: {_beginning(prompt)}"
        )


def tell_of_all(cuts: Mapping[str | None, Cuts]) -> None:
    """Says for each encoder how many of these prompts are cut, and shows the first. cuts: of every prompt."""
    for encoder in dict.fromkeys(encoder for found in cuts.values() for encoder in found):
        cut = {prompt: found[encoder] for prompt, found in cuts.items() if encoder in found}
        prompt, (tokens, limit) = next(iter(cut.items()))
        notice(
            f"{len(cut):,} of {len(cuts):,} prompts are longer than the {limit} tokens that {encoder} reads; their "
            f"ends have no effect, such as that of one with {tokens} tokens: {_beginning(prompt)}"
        )


def _beginning(prompt: str | None) -> str:
    return f"{(prompt or '')[:60]!r}…"
