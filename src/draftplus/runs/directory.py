"""Run directories: which steps are saved, who may write, and what is removed when a run starts again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from draftplus.config import AnyConfig, Config, remember, to_yaml
from draftplus.errors import Interrupted, UserError
from draftplus.runs import journal
from draftplus.runs.files import clean, file_mode, remove, remove_made, write_text
from draftplus.runs.origin import ORIGIN, absolute_paths

SCALES = "reward_scales.json"  # what rewards are normalised by
BEGUN = {".lock", "config.yaml", ORIGIN, SCALES, "samples", "tensorboard"}  # what a run has before its first result


@dataclass(frozen=True)
class WeightNames:
    """Where a run keeps the weights that it trained. each: those of every evaluation. result: those that it ends with,
    or, where `best`, those of the evaluation that best.json names."""

    each: str
    result: str
    best: bool = False


ADAPTERS = WeightNames("adapters", "adapter")
REWARDS = WeightNames("rewards", "reward", best=True)  # of a run that trains a reward


def is_run(target: str | Path) -> bool:
    """Whether a path is a run directory."""
    return (Path(target) / "config.yaml").is_file()


def step_name(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:06d}"


def saved_steps(directory: Path) -> list[int]:
    """The steps that are saved below a directory, ascending."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir()]  # not glob, for which a directory that is unreadable is empty
    return sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Makes the run directory and holds it against a second process.

    Raises UserError where it cannot be written, or another process trains in it.
    """
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        # a look at whether it is held, `is_held`, takes no longer than the timeout
        lock = FileLock(run / ".lock", timeout=1, mode=file_mode(run))
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{run}: another process is training in it; wait for it to finish, or choose another name="
        ) from None
    except OSError as error:
        raise UserError(
            f"{run}: the run directory cannot be written: {error.strerror}; set another output_dir="
        ) from None
    try:
        yield
    except (Exception, Interrupted) as error:
        nothing = {".lock"} if isinstance(error, Interrupted) else BEGUN  # what was stopped can be continued
        remove_made(made, keep=lambda: any(path.name not in nothing for path in run.iterdir()))
        raise
    finally:
        lock.release()


def is_held(run: Path) -> bool:
    """Whether a process is training in a run directory. The kernel releases its lock when it ends, however it ends."""
    if not (run / ".lock").is_file():
        return False
    lock = FileLock(run / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:  # another user's directory, of which nothing is known
        return False
    lock.release()
    return False


def write_config(run: Path, config: AnyConfig) -> None:
    """Writes config.yaml, which makes a directory a run; only once it is known that the run can start.

    The code that it names is trusted from then on: its user typed it, or was asked.
    """
    told = absolute_paths(config)
    write_text(run / "config.yaml", to_yaml(told))
    if isinstance(told, Config):  # no other names code
        remember(run / "config.yaml", told)


def forget_after(run: Path, step: int) -> None:
    """Removes what a run wrote past the step that it is restored to; -1: everything, for a run that starts anew.

    And what a process that died left half written or half removed.
    """
    weights = [run / names.each for names in (ADAPTERS, REWARDS)]
    for parent in (run, run / "samples", *weights, run / "checkpoints"):
        clean(parent)
    if step < 0:
        (run / ORIGIN).unlink(missing_ok=True)
    for name in ("metrics.jsonl", "eval.jsonl"):
        journal.drop_rows_after(run / name, step)
    for parent in (run / "samples", *weights):
        for late in saved_steps(parent):
            if late > step:
                remove(parent / step_name(late))
