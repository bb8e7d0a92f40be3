"""What went wrong where it is neither a user's mistake nor a fault of the program: the disk, permissions, memory."""

from __future__ import annotations

import errno

# what a system may deny to a correct program
_DENIED = {
    getattr(errno, name)
    for name in (
        "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ELOOP",
        "EMFILE", "ENFILE", "ESTALE", "ETXTBSY",
    )
}  # fmt: skip
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "STATUS_ALLOC_FAILED")


def in_one_line(error: BaseException) -> str | None:
    """The line that says it all of such a failure; None for any other, whose traceback is needed."""
    if _is_memory(error):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"out of memory ({reason[:160].rstrip('. ')}); lower train.micro_batch_size (images of a backward pass), "
            "train.sampling_batch_size (images of a pass without gradient) or sampler.height and sampler.width, or set "
            "model.gradient_checkpointing=true or model.dtype=bfloat16"
        )
    if isinstance(error, OSError) and error.errno in _DENIED:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return f"{' and '.join(paths) or 'writing failed'}: {error.strerror}"
    return None


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch says it in its own exception on a GPU, in a RuntimeError on a CPU; importing it here would take a second
    told = str(error).lower()
    return isinstance(error, RuntimeError) and any(words.lower() in told for words in _OUT_OF_MEMORY)
