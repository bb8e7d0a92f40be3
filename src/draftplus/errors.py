"""The exceptions of the whole package, and its notices; here because the command line needs them before torch."""

import os
import sys
from functools import lru_cache


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, written as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its one or two lines and exits with 2."""


class Interrupted(BaseException):
    """Somebody asked the process to stop; what was complete is saved."""


@lru_cache(maxsize=256)
def notice(message: str) -> None:
    """One line on stderr that the user should know; the same one once in a process, and by the first of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"draftplus: {printable(message)}", file=sys.stderr, flush=True)
