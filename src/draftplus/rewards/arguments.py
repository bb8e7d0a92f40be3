"""Checks of the `args` that a recipe gives to a reward."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from draftplus.errors import UserError


def refuse_unknown(name: str, args: Mapping[str, Any], known: Collection[str]) -> None:
    """UserError where `args` has a key that reward `name` does not know; it names the nearest one."""
    for key in args:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(sorted(known)) or 'none'}."
            raise UserError(f"reward '{name}' has no argument '{key}' in args: {hint}")
