"""Which model and which of a run's trained weights `MODEL`, `RUN`, `RUN@step` and `RUN@best` mean."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from draftplus.config import Config, load_config, nearest, refuse_nobodys_home
from draftplus.errors import UserError, notice
from draftplus.models.families import MODELS, resolve
from draftplus.models.lora_files import lora_file
from draftplus.runs.checksums import read_sums, verify
from draftplus.runs.directory import is_run, saved_steps, step_name
from draftplus.runs.origin import run_config


@dataclass(frozen=True)
class Weights:
    """A model to sample: its configuration, and the directory of trained weights, None for the base model."""

    config: Config
    adapter: Path | None
    label: str


def parted(target: str) -> tuple[str, str, str]:
    """A target's path, the last @ and what follows; these two are empty where it has none, or is a run with an @."""
    path, sign, at = ("", "", "") if is_run(target) else target.rpartition("@")
    return path or target, sign, at


def find_weights(target: str, overrides: Sequence[str] = (), code: Collection[str] | None = None) -> Weights:
    """What `MODEL`, `RUN`, `RUN@step` or `RUN@best` means. code: as for `load_run_config`.

    Raises UserError for a step that was not saved, and for code of a run that is not trusted.
    """
    refuse_nobodys_home("target", target)
    _refuse_gate(overrides)
    path, sign, at = parted(target)
    if not is_run(path):
        if sign:
            raise UserError(f"'{target}': {path} is not a run directory, so it has no '{at}'")
        _refuse_missing(target)
        if lora_file(Path(target).expanduser()) is not None:
            raise UserError(
                f"'{target}' is an adapter; name the model or run that it is for, and give it as the adapter"
            )
        config = load_config(None, [f"model.path={json.dumps(target)}", *overrides])
        if config.model.path != target:
            raise UserError(f"'{target}' is given but model.path={config.model.path} is set too; remove one of them")
        return Weights(resolve(config), None, target)
    run = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()  # "." has no name
    config = resolve(run_config(run, overrides, code))
    steps = saved_steps(run / "adapters")
    if not sign:
        adapter = run / "adapter"
        if not adapter.is_dir():
            if not steps:
                raise UserError(f"{run} has no trained weights yet; run: draftplus train {run}")
            adapter = run / "adapters" / step_name(steps[-1])
        elif steps:
            _tell_if_earlier(run, steps[-1])
        return Weights(config, intact(adapter), run.name)
    step = _best(run) if at == "best" else int(at) if at.isdecimal() else None
    if step is None:
        raise UserError(f"'{target}': give a step or best after the @")
    if step not in steps:
        raise UserError(
            f"{run} has no adapter of step {step}; its steps are {', '.join(map(str, steps)) or 'none yet'}"
        )
    return Weights(config, intact(run / "adapters" / step_name(step)), f"{run.name}@{step}")


def _tell_if_earlier(run: Path, newest: int) -> None:
    """One line where a run has gone on since it wrote adapter/, the weights of an end, which is evaluated too."""
    sums: list[dict[str, str] | None] = [None]
    with suppress(OSError, ValueError):  # of the weights that are taken, `intact` tells
        sums = [read_sums(run / name) for name in ("adapter", f"adapters/{step_name(newest)}")]
    if None not in sums and sums[0] != sums[1]:
        notice(
            f"{run}/adapter is what training ended with before the run was continued; its newest weights are "
            f"{run}@{newest}"
        )


def intact(adapter: Path) -> Path:
    """Trained weights, a directory or a file. Raises UserError where the files there are not as they were written."""
    try:
        verify(adapter) if adapter.is_dir() else verify(adapter.parent, adapter.name)
    except ValueError as error:
        others = "the same draftplus train command writes adapter/ again, and RUN@step names the weights of a step"
        raise UserError(f"{adapter}: damaged ({error}); use other weights: {others}") from None
    return adapter


def _refuse_gate(overrides: Sequence[str]) -> None:
    """UserError for a gate beside a target, whose weights have their own."""
    if any(one.partition("=")[0].strip() == "objective.gate" for one in overrides):
        raise UserError(
            "objective.gate is set in training, and trained weights remember theirs; to sample them otherwise, use "
            "--anneal tuned for no gate, or --anneal step:F for one at the fraction F"
        )


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
    except FileNotFoundError:
        floor = run_config(run, code=()).stop.diversity_floor
        why = "it is written at the first evaluation after step 0"
        if floor is not None:
            why += f" with an LPIPS of at least stop.diversity_floor={floor:g} times the base model's"
        raise UserError(f"{run} has no best.json; {why}") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(
            f"{run / 'best.json'} does not say which step is the best; to write it again, run: draftplus train {run}"
        ) from None
