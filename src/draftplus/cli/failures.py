"""What went wrong where it is neither a user's mistake nor a fault of the program: the disk, permissions, memory."""

from __future__ import annotations

import errno

from draftplus.errors import WHERE, is_out_of_memory

# what a system may deny to a correct program
_DENIED = {
    getattr(errno, name)
    for name in (
        "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP",
        "EMFILE", "ENFILE", "ESTALE", "ETXTBSY",
    )
}  # fmt: skip


def in_one_line(error: BaseException) -> str | None:
    """The line that says it all of such a failure; None for any other, whose traceback is needed."""
    if is_out_of_memory(error):
        notes = [note.removeprefix(WHERE) for note in getattr(error, "__notes__", ()) if note.startswith(WHERE)]
        where = f" in {', '.join(dict.fromkeys(notes))}" if notes else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"out of memory{where} ({reason[:160].rstrip('. ')}); lower train.micro_batch_size (images of a backward "
            "pass), train.sampling_batch_size (images of a pass without gradient) or sampler.height and sampler.width, "
            "or set model.gradient_checkpointing=true, model.dtype=bfloat16 or model.offload=true; draftplus plan, "
            "with the same recipe and settings and --memory, says which of these is enough"
        )
    if isinstance(error, OSError) and error.errno in _DENIED:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return f"{' and '.join(paths) or 'writing failed'}: {error.strerror}"
    return None
