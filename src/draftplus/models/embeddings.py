"""Text embeddings, computed once for each prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from draftplus.types import Conditioning

CACHE_BYTES = 2**28  # about 1,100 prompts of Stable Diffusion 1.5


class Embeddings:
    """A bounded cache of prompts' embeddings, which keeps those used last.

    embed: a prompt -> its conditioning, one row. One prompt at a time: its embedding must not depend, not even in the
    last bit, on what shared its batch, or a resumed run with an empty cache would depart from the uninterrupted one.
    """

    def __init__(self, embed: Callable[[str | None], Conditioning]) -> None:
        self._embed = embed
        self._rows: OrderedDict[str | None, Conditioning] = OrderedDict()
        self._bytes = 0

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """The conditioning of b prompts, without gradient."""
        found = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([found[prompt] for prompt in prompts])

    def _row(self, prompt: str | None) -> Conditioning:
        if prompt not in self._rows:
            with torch.no_grad():
                row = self._embed(prompt)
            self._rows[prompt] = row
            self._bytes += row.nbytes
            while self._bytes > CACHE_BYTES and len(self._rows) > 1:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes
        self._rows.move_to_end(prompt)
        return self._rows[prompt]
