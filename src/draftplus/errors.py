"""The exceptions of the whole package, and its notices; here because the command line needs them before torch."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

# how the allocators of torch and of the system say it; torch's own exception is a RuntimeError, too
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "status_alloc_failed"
)  # fmt: skip
WHERE = "out of memory in "  # how the notes begin that such an error is given on its way


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, written as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its one or two lines and exits with 2."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


@contextmanager
def needs_memory(part: str) -> Iterator[None]:
    """Where memory runs out inside, the error is given a note that names the part."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(f"{WHERE}{part}")
        raise


def first_line(error: Exception) -> str:
    """The message of an error in one line, with the first detail if that line only announces details."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class Interrupted(BaseException):
    """Somebody asked the process to stop; what was complete is saved."""


class Stalled(RuntimeError):
    """Processes that wait for one another will not get on: one died, hangs or has left. The message is the one line."""


@lru_cache(maxsize=256)
def notice(message: str) -> None:
    """One line on stderr that the user should know; the same one once in a process, and by the first of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"draftplus: {printable(message)}", file=sys.stderr, flush=True)
