"""Writing so that nothing is ever left incomplete: to a temporary path beside the target first, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from draftplus.errors import UserError


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill; it takes `target`'s place, replacing what was there, only once it is complete.

    Raises UserError where the disk is full; what stood at `target` is untouched then.
    """
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with disk_errors(target):
            building.mkdir(parents=True)
            yield building
            for file in building.rglob("*"):
                _sync(file)
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            building.rename(target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def output_held(directory: Path) -> Iterator[None]:
    """Makes a directory for a command's results, and holds it against a second process.

    Raises UserError where it cannot be made, or another process writes to it.
    """
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"'{directory}': another process is writing to it; name another output directory") from None
    except OSError as error:
        raise UserError(f"'{directory}' cannot be created: {error.strerror}; name another output directory") from None
    try:
        yield
    finally:
        lock.release()


def write_text(target: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises UserError where the disk is full; what stood at `target` is untouched then.
    """
    building = target.with_name(f".{target.name}.building")
    try:
        with disk_errors(target):
            building.write_text(text, encoding="utf-8")
            _sync(building)
            building.replace(target)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns the errors of a full disk into a UserError about `target`."""
    try:
        yield
    except Exception as error:
        # safetensors reports the operating system's error in an exception of its own
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise UserError(
                f"{target}: no space left on the disk; what was saved before is intact. "
                "Free some space and repeat the command to continue"
            ) from None
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
