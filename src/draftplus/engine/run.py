"""Run directories: where a run lies, whether it may be continued, and which of its weights somebody means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from draftplus.config import Config, load_config, nearest, run_name, shaping_keys, to_yaml
from draftplus.engine import journal
from draftplus.engine.build import MODELS
from draftplus.engine.checkpoint import saved_steps, step_name
from draftplus.engine.files import write_text
from draftplus.errors import UserError


@dataclass(frozen=True)
class Weights:
    """A model to sample: its configuration, and the directory of trained weights, None for the base model."""

    config: Config
    adapter: Path | None
    label: str


def is_run(target: str | Path) -> bool:
    """Whether a path is a run directory."""
    return (Path(target) / "config.yaml").is_file()


def plan_run(target: Config | str | Path | None, overrides: Sequence[str]) -> tuple[Config, Path]:
    """The configuration and directory of a run. target: a configuration, a recipe, or a run directory to continue.

    Raises UserError where the configuration is wrong, or a run would be continued with a changed key.
    """
    if isinstance(target, Config):
        config = load_config(None, overrides, base=target)
        config.name = run_name(config, "run")
        run = Path(config.output_dir) / config.name
    elif target is not None and is_run(target):
        run = Path(target) if Path(target).name else Path(target).resolve()  # "." has no name
        config = load_config(run / "config.yaml", overrides)
        config.output_dir, config.name = str(run.parent), run.name
    else:
        config = load_config(target or "emoji", overrides)
        config.name = run_name(config, Path(target or "emoji").stem)
        run = Path(config.output_dir) / config.name
    if is_run(run) and saved_steps(run / "checkpoints"):  # without one there is nothing to continue
        _refuse_changes(load_config(run / "config.yaml"), config, run)
    elif (run / "adapter").is_dir():  # a run that was killed before its first checkpoint has none, and starts anew
        raise UserError(f"{run} holds a result but no checkpoint to continue from; give another name=, or remove it")
    return config, run


def _refuse_changes(before: Config, now: Config, run: Path) -> None:
    old, new = shaping_keys(before), shaping_keys(now)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{run} was made with {key}={old.get(key)}, now it is {new.get(key)}: a run continues only with the "
                f"keys that shaped it. Give it another name=, or {key}={old.get(key)}"
            )


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Makes the run directory and holds it against a second process.

    Raises UserError where it cannot be written, or another process trains in it.
    """
    lock = FileLock(run / ".lock", timeout=0)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{run}: another process is training in it; wait for it, or give another name=") from None
    except OSError as error:
        raise UserError(f"{run}: the run directory cannot be written: {error.strerror}; set output_dir=") from None
    try:
        yield
    finally:
        lock.release()


def write_config(run: Path, config: Config) -> None:
    """Writes config.yaml, which makes a directory a run; only once it is known that the run can start."""
    write_text(run / "config.yaml", to_yaml(config))


def forget_after(run: Path, step: int) -> None:
    """Removes what a run wrote past the step that it is restored to; -1: everything, for a run that starts anew."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        journal.drop_rows_after(run / name, step)
    for parent in (run / "samples", run / "adapters"):
        for late in saved_steps(parent):
            if late > step:
                shutil.rmtree(parent / step_name(late))


def find_weights(target: str, overrides: Sequence[str] = ()) -> Weights:
    """What `MODEL`, `RUN`, `RUN@step` or `RUN@best` means.

    Raises UserError for a step that was not saved.
    """
    path, _, at = target.partition("@")
    if not is_run(path):
        if at:
            raise UserError(f"'{target}': {path} is not a run directory, so it has no '{at}'")
        _refuse_missing(target)
        config = load_config(None, [f"model.path={json.dumps(target)}", *overrides])
        if config.model.path != target:
            raise UserError(f"'{target}' is named and model.path={config.model.path} is set too; name the one you mean")
        if target == "emoji":  # it has its own guidance
            config = load_config("emoji", list(overrides))
        return Weights(config, None, target)
    run = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()  # "." has no name
    config = load_config(run / "config.yaml", overrides)
    steps = saved_steps(run / "adapters")
    if not at:
        adapter = run / "adapter"
        if not adapter.is_dir():
            if not steps:
                raise UserError(f"{run} has no trained weights yet; run: draftplus train {run}")
            adapter = run / "adapters" / step_name(steps[-1])
        return Weights(config, adapter, run.name)
    step = _best(run) if at == "best" else int(at) if at.isdecimal() else None
    if step is None:
        raise UserError(f"'{target}': after @ comes a step or best")
    if step not in steps:
        raise UserError(f"{run} has no adapter of step {step}; it has {', '.join(map(str, steps)) or 'none yet'}")
    return Weights(config, run / "adapters" / step_name(step), f"{run.name}@{step}")


def _refuse_missing(target: str) -> None:
    """UserError for what is neither here nor could be a hub id, which is OWNER/NAME."""
    path = Path(target).expanduser()
    owner, slash, _ = target.partition("/")
    local = owner in (".", "~", "", "runs", "sweeps") or Path(owner).is_dir()
    hub = slash and target.count("/") == 1 and not local
    if target in MODELS or path.exists() or hub:
        return
    beside = [str(path.parent / one.name) for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(target, [*beside, *MODELS])
    raise UserError(f"'{target}': no such run, model or adapter{f'; {near}' if near else ''}")


def _best(run: Path) -> int:
    try:
        return int(json.loads((run / "best.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError):
        floor = load_config(run / "config.yaml").stop.diversity_floor
        why = "it is written at the first evaluation after a step"
        if floor is not None:
            why += f" whose LPIPS is at least stop.diversity_floor={floor:g} times the base model's"
        raise UserError(f"{run} has no best.json; {why}") from None
