"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from draftplus.config.schema import ParallelConfig
from draftplus.errors import UserError

UNITS = {"": 30, "B": 0, "KB": 10, "MB": 20, "GB": 30, "TB": 40}


def bytes_in(text: str) -> int | None:
    """The bytes of a size such as 24GB; None where the text is none. GB and GiB are both 2^30 bytes, as makers of
    memory count; without a unit it is in these."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])I?)?(B?)", text.strip().upper())
    unit = f"{found[2]}B" if found and found[2] else found[3] if found else None
    return int(float(found[1]) * 2 ** UNITS[unit]) if found and unit is not None else None


def shard_frozen_above(config: ParallelConfig) -> int | None:
    """The bytes of that key; None: never.

    Raises UserError for anything else.
    """
    text = config.shard_frozen_above
    above = None if text is None else bytes_in(text)
    if text is not None and above is None:
        raise UserError(f"parallel.shard_frozen_above is '{text}'; give a size of memory, such as 1GiB, or null")
    return above
