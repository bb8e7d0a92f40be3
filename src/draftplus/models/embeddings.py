"""Text embeddings, computed once for each prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

from draftplus.models.embedding_store import EmbeddingStore, Found
from draftplus.models.truncation import tell_of_all, tell_of_one
from draftplus.progress import Advance
from draftplus.types import Conditioning

CACHE_BYTES = 2**28  # about 1,100 prompts of Stable Diffusion 1.5


class Embeddings:
    """A bounded cache of prompts' embeddings, which keeps those used last; where there is a store, also on disk.

    embed: a prompt -> its conditioning, one row. One prompt at a time: its embedding must not depend, not even in the
    last bit, on what shared its batch, or a resumed run with an empty cache would depart from the uninterrupted one.
    state: what else an embedding depends on, now; None: nothing, and only then it goes to the store or comes from it.
    """

    def __init__(
        self, embed: Callable[[str | None], Conditioning], state: Callable[[], Hashable] | None = None,
        store: EmbeddingStore | None = None,
    ) -> None:  # fmt: skip
        self._embed, self._state, self._store = embed, state, store
        self._rows: OrderedDict[tuple[Hashable, str | None], Conditioning] = OrderedDict()
        self._bytes = 0
        self._cuts: dict[str, tuple[int, int]] = {}  # of the prompt that is embedded now
        self._told_of_length = False

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """The conditioning of b prompts, without gradient."""
        state = self._state_now()
        found = {prompt: self._row(state, prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([found[prompt] for prompt in prompts])

    def cut(self, tokens: int, limit: int, encoder: str = "the text encoder") -> None:
        """For `embed` to call: how many tokens a prompt has, and how many the encoder reads. The user is told of more.

        Without `prepare` of the first such prompt, and after it of how many there are.
        """
        if tokens > limit:
            self._cuts[encoder] = (tokens, limit)

    def prepare(self, prompts: Sequence[str | None], advance: Advance, share: tuple[int, int] = (0, 1)) -> bool:
        """Makes sure that prompts are in the store; only those that are not are embedded.

        advance: told how many are done of the distinct prompts of this share. share: (rank, number of shares): every
        process embeds its own, and afterwards, where there are several, looks through all of them by a second call.

        Returns whether all of the share can be had without the text encoders. False where there is no store, or none
        that can be written to, or embeddings now depend on more than the prompt.

        Raises UserError where the prompts need more room than the store may take, as soon as that is known.
        """
        store, count = self._store, len(set(prompts))
        if store is None or self._state_now() is not None:
            return False
        store.keep(prompts)
        mine = list(dict.fromkeys(prompts))[share[0] :: share[1]]
        found = {prompt: there for prompt in mine if (there := store.size(prompt)) is not None}
        absent = [prompt for prompt in mine if prompt not in found]
        sizes = [size for size, _ in found.values()]
        cuts = {prompt: found[prompt][1] if prompt in found else {} for prompt in mine}
        store.refuse_too_many(sizes, len(sizes))
        advance(len(found), "")
        for number, prompt in enumerate(absent):
            made = self._made(prompt)
            size = store.put(prompt, *made)
            if size is None:
                return False
            self._remember((None, prompt), made.row)
            sizes.append(size)
            cuts[prompt] = made.cuts
            store.refuse_too_many(sizes, count if number == 0 else len(sizes))
            advance(len(sizes), "")
        if share[1] == 1:
            self._told_of_length = any(cuts.values())
            tell_of_all(cuts)
        return True

    def _state_now(self) -> Hashable:
        return self._state() if self._state else None

    def _row(self, state: Hashable, prompt: str | None) -> Conditioning:
        key = (state, prompt)
        if key not in self._rows:
            store = self._store if state is None else None
            found = store.get(prompt) if store else None
            made = found or self._made(prompt)
            if store and not found:
                store.put(prompt, *made)
            if made.cuts and not self._told_of_length:
                self._told_of_length = True
                tell_of_one(prompt, made.cuts)
            self._remember(key, made.row)
        self._rows.move_to_end(key)
        return self._rows[key]

    def _made(self, prompt: str | None) -> Found:
        self._cuts = {}
        with torch.no_grad():
            row = self._embed(prompt)
        return Found(row, self._cuts)

    def _remember(self, key: tuple[Hashable, str | None], row: Conditioning) -> None:
        self._rows[key] = row
        self._bytes += row.nbytes
        while self._bytes > CACHE_BYTES and len(self._rows) > 1:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes
