"""Writing so that nothing is ever left incomplete: to a temporary path beside the target first, then one rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from draftplus.errors import Interrupted, UserError
from draftplus.runs.checksums import write_sums

BUILDING, OLD, REMOVED = ".building", ".old", ".removed"


def beside(target: Path, what: str) -> Path:
    """The hidden name that something has while it becomes `target`, or is no longer that; no loader looks there."""
    return target.with_name(f".{target.name}{what}")


@contextmanager
def whole_directory(target: Path, checksums: bool = False) -> Iterator[Path]:
    """A directory to fill; it takes `target`'s place, replacing what was there, only once it is complete.

    checksums: whether a file of them is added. Raises UserError where the disk is full; what stood at `target` is
    untouched then.
    """
    building = beside(target, BUILDING)
    shutil.rmtree(building, ignore_errors=True)
    try:
        with disk_errors(target):
            building.mkdir(parents=True)
            yield building
            if checksums:
                write_sums(building)
            mode = file_mode(building)
            for file in building.rglob("*"):
                if file.is_file():
                    file.chmod(mode)  # safetensors makes its files private, whatever the umask says
                _sync(file)
            old = beside(target, OLD)
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            building.rename(target)
            _sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def file_mode(directory: Path) -> int:
    """The permissions of a new file by the umask, seen from those of a directory that was made under it."""
    return directory.stat().st_mode & 0o666


def remove(directory: Path) -> None:
    """Removes a directory, at once for all who look for its name: a process that dies on the way leaves no half."""
    removed = beside(directory, REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    directory.rename(removed)
    shutil.rmtree(removed)


def clean(parent: Path) -> None:
    """Removes what a process that died left half written or half removed in a directory.

    What had to make room for something that never came is put back.
    """
    for path in parent.glob(".*"):
        kept = path.with_name(path.name[1:].removesuffix(OLD))
        if path.name.endswith(OLD) and not kept.exists():
            path.rename(kept)
        elif path.name.endswith((BUILDING, OLD, REMOVED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_output(directory: Path) -> None:
    """Makes a directory for a command's results. UserError where it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{directory}' cannot be created: {error.strerror}; name another output directory") from None


@contextmanager
def output_held(directory: Path) -> Iterator[None]:
    """`make_output`, and the directory is held against a second process. What was refused leaves no new one behind.

    Raises UserError where it cannot be made, or another process writes to it.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    make_output(directory)
    try:
        lock = FileLock(directory / ".lock", timeout=0, mode=file_mode(directory))
        lock.acquire()
    except Timeout:
        raise UserError(f"'{directory}': another process is writing to it; name another output directory") from None
    except OSError as error:
        raise UserError(f"'{directory}' cannot be written: {error.strerror}; name another output directory") from None
    try:
        yield
    except (Exception, Interrupted):
        remove_made(made, keep=lambda: any(one.name != ".lock" for one in directory.iterdir()))
        raise
    finally:
        lock.release()


def remove_made(made: Sequence[Path], keep: Callable[[], bool]) -> None:
    """Removes the directories that a command made, the innermost first, where it failed before it had a result.

    keep: whether the innermost has one.
    """
    if made and not keep():
        shutil.rmtree(made[0], ignore_errors=True)
        with suppress(OSError):  # others may have come to use those above
            for path in made[1:]:
                path.rmdir()


def write_text(target: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises UserError where the disk is full; what stood at `target` is untouched then.
    """
    building = beside(target, BUILDING)
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
