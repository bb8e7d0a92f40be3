"""Text embeddings, computed once for each prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch

from draftplus.types import Conditioning

CACHE_BYTES = 2**28  # about 1,100 prompts of Stable Diffusion 1.5


class Embeddings:
    """A bounded cache of prompts' embeddings, which keeps those used last.

    embed: a prompt -> its conditioning, one row. One prompt at a time: its embedding must not depend, not even in the
    last bit, on what shared its batch, or a resumed run with an empty cache would depart from the uninterrupted one.
    state: what else an embedding depends on, now; None: nothing.
    """

    def __init__(
        self, embed: Callable[[str | None], Conditioning], state: Callable[[], Hashable] | None = None
    ) -> None:
        self._embed, self._state = embed, state
        self._rows: OrderedDict[tuple[Hashable, str | None], Conditioning] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """The conditioning of b prompts, without gradient."""
        state = self._state() if self._state else None
        found = {prompt: self._row(state, prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([found[prompt] for prompt in prompts])

    def _row(self, state: Hashable, prompt: str | None) -> Conditioning:
        key = (state, prompt)
        if key not in self._rows:
            with torch.no_grad():
                row = self._embed(prompt)
            self._rows[key] = row
            self._bytes += row.nbytes
            while self._bytes > CACHE_BYTES and len(self._rows) > 1:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes
        self._rows.move_to_end(key)
        return self._rows[key]
