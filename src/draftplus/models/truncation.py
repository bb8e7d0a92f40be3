"""Prompts that are longer than a text encoder reads: the stock pipelines cut them, and the user should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftplus.errors import notice

Cuts = Mapping[str, tuple[int, int]]  # encoder -> (tokens of a prompt, how many of them are read)


def tell_of_one(prompt: str | None, cuts: Cuts) -> None:
    """Says that a prompt is cut, and that others may be."""
    for tokens, limit in dict.fromkeys(cuts.values()):
        reading = _reading([encoder for encoder, told in cuts.items() if told == (tokens, limit)])
        notice(
            f"a prompt has {tokens} tokens, and {reading} the first {limit}; its end, and that of other long prompts, "
            f"has no effect: {_beginning(prompt)}"
        )


def tell_of_all(cuts: Mapping[str | None, Cuts]) -> None:
    """Says for each encoder how many of these prompts are cut, and shows the first. cuts: of every prompt."""
    alike: dict[
        tuple[int, str | None, tuple[int, int]], list[str]
    ] = {}  # (how many, the first, its tokens) -> encoders
    for encoder in dict.fromkeys(encoder for found in cuts.values() for encoder in found):
        cut = [prompt for prompt, found in cuts.items() if encoder in found]
        alike.setdefault((len(cut), cut[0], cuts[cut[0]][encoder]), []).append(encoder)
    for (count, prompt, (tokens, limit)), encoders in alike.items():
        notice(
            f"{count:,} of {len(cuts):,} prompts are longer than the {limit} tokens that {_reading(encoders)}; their "
            f"ends have no effect, such as that of one with {tokens} tokens: {_beginning(prompt)}"
        )


def _reading(encoders: Sequence[str]) -> str:
    return f"{' and '.join(encoders)} {'read' if len(encoders) > 1 else 'reads'}"


def _beginning(prompt: str | None) -> str:
    return f"{(prompt or '')[:60]!r}…"
