"""What went wrong where it is neither a user's mistake nor a fault of the program: the disk, permissions, memory,
another process."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from draftplus.errors import WHERE, Stalled, is_out_of_memory

PLAN = "draftplus plan "  # how the note begins that is the command of a plan

# what a system may deny to a correct program
_DENIED = {
    getattr(errno, name)
    for name in (
        "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP",
        "EMFILE", "ENFILE", "ESTALE", "ETXTBSY",
    )
}  # fmt: skip


@contextmanager
def plannable(target: str, settings: Sequence[str]) -> Iterator[None]:
    """Where memory runs out inside, the error is given a note with the command that plans a run like this one."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            ranks = os.environ.get("WORLD_SIZE", "1")
            several = [] if ranks == "1" else ["--gpus", ranks]
            error.add_note(PLAN + shlex.join([target, *settings, *several]))
        raise


def _planned(error: BaseException) -> str:
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(PLAN)]
    if not notes:
        return ""
    found = re.search(r"total capacity of (\d[\d.]*) GiB", str(error))
    size = f"--memory {found[1]}GB" if found else "--memory with the size of the device, such as 24GB,"
    return f"; {notes[0]} {size} says which of these is enough"


def in_one_line(error: BaseException) -> str | None:
    """The line that says it all of such a failure; None for any other, whose traceback is needed."""
    if isinstance(error, Stalled):
        return str(error)
    if is_out_of_memory(error):
        notes = [note.removeprefix(WHERE) for note in getattr(error, "__notes__", ()) if note.startswith(WHERE)]
        where = f" in {', '.join(dict.fromkeys(notes))}" if notes else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"out of memory{where} ({reason[:160].rstrip('. ')}); lower train.micro_batch_size (images of a backward "
            "pass), train.sampling_batch_size (images of a pass without gradient) or sampler.height and sampler.width, "
            f"or set model.gradient_checkpointing=true, model.dtype=bfloat16 or model.offload=true{_planned(error)}"
        )
    if isinstance(error, OSError) and error.errno in _DENIED:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return f"{' and '.join(paths) or 'writing failed'}: {error.strerror}"
    return None
