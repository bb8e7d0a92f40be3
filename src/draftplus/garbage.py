"""When Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Inside, nobody looks for garbage: for work that makes a great many objects and throws few away.

    Looking takes a fifth of the time of importing large libraries, and of reading a large file of prompts beside them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
