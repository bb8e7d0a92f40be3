"""The loop of training, which reads from top to bottom: steps, evaluations, checkpoints, guards, logs, interruption."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from draftplus.config import COMMANDS, AnyConfig, to_dict
from draftplus.distributed import World
from draftplus.errors import Interrupted, UserError
from draftplus.progress import progress
from draftplus.runs import journal
from draftplus.runs.directory import ADAPTERS, WeightNames, forget_after, step_name, write_config
from draftplus.runs.files import whole_directory
from draftplus.runs.journal import Row
from draftplus.training import checkpoint
from draftplus.training.guards import write_stopped
from draftplus.training.interrupt import interruption
from draftplus.training.optim import learning_rate, tell_of_idle_steps
from draftplus.training.state import State, initial_state
from draftplus.training.task import Abandonable, Task


def drive(
    task: Task, config: AnyConfig, run: Path, here: World,
    told: Callable[[Path], None] | None = None, weights: WeightNames = ADAPTERS,
) -> None:  # fmt: skip
    """Trains from the newest checkpoint in `run`, or from the start, to the last step or until a guard stops it.

    told: called with the run after each evaluation, on the main process. weights: what the run calls them.

    Raises UserError for a user's mistake, and Interrupted, once the last complete step is saved, where the process is
    asked to stop.
    """
    state = initial_state(task.parameters, config.optim)
    restored = checkpoint.restore(run / "checkpoints", state)
    if len(set(here.gather(state.step))) > 1:
        raise UserError(f"{run}: the processes found different checkpoints; output_dir must be shared by all machines")
    if state.step > task.total:
        raise UserError(
            f"{run} has done {state.step} steps already, more than the {task.total} that train.steps or train.epochs "
            f"now asks for; set train.steps={state.step} or more. Weights of earlier steps are in {run / weights.each}"
        )
    if here.is_main:
        tell_of_idle_steps(config.optim, task.total)
        forget_after(run, state.step if restored else -1)
        write_config(run, config)
    here.barrier()
    rows = here.gather(journal.read_evaluations(run / "eval.jsonl"))[0]
    evaluated = {row["step"] for row in rows}
    evaluations = task.comparable(rows)
    if here.is_main:
        task.write_best(evaluations)
        if task.stop_reason(evaluations) is None:  # it goes on
            write_stopped(run, state.step, None)
    task.before(sorted(evaluated), state.step)
    logs = here.is_main and (state.step < task.total or state.step not in evaluated)  # a finished run says nothing
    loggers = journal.open_loggers(config.log.to if logs else (), run, to_dict(config), state.step)
    saved = tried = state.step

    def save_state() -> None:
        nonlocal saved, tried
        if state.step > saved:
            tried = state.step
            checkpoint.save(run / "checkpoints", state, config.checkpoint.keep, here)
            saved = state.step

    def save_last() -> None:
        if not state.torn:
            save_state()
        if here.is_main:
            print(f"stopped after step {saved}; continue with: {COMMANDS[type(config)]} {run}", file=sys.stderr)

    def save_after_error() -> None:
        if state.step == 0 or tried > saved:  # nothing to save, or saving is what failed
            return
        try:
            save_last()
        except Exception as error:  # that of the training is the one to be told
            print(f"the state after step {state.step} could not be saved: {error}", file=sys.stderr)

    note = ""  # on the last step

    with interruption(here.meeting) as interrupt, progress("training", task.total, here.is_main, "steps") as advance:

        def evaluating(done: int, doing: str) -> None:
            advance(done, ", ".join(filter(None, [doing, note])))

        try:
            while True:
                stopped = task.stop_reason(evaluations)
                last = state.step >= task.total or stopped is not None
                if state.step not in evaluated and (state.step % config.eval.every == 0 or last):
                    with state.averaged(), interrupt.abandonable():
                        row = task.evaluate(state.step, evaluating)
                    evaluated.add(state.step)
                    evaluations.append(row)
                    _save_weights(task, state, run / weights.each / step_name(state.step), here)
                    if here.is_main:
                        journal.append_row(run / "eval.jsonl", row)
                        task.write_best(evaluations)
                        _log(loggers, "held_out/", row, state.step)
                        if told is not None:
                            told(run)
                    advance.event(state.step, ", ".join(filter(None, [_measured(row), note])))
                    continue  # what it found may end the run
                if state.step % config.checkpoint.every == 0 or last:
                    save_state()
                if last:
                    with state.averaged(), interrupt.abandonable():
                        task.finish(state.step, evaluating)
                    break

                row = _step(task, state, config, interrupt.abandonable, run if here.is_main else None)
                if here.is_main:
                    _log(loggers, "train/", row, state.step)
                note = task.note(row)
                advance(state.step, note)
        except Interrupted:
            here.leave()
            save_last()
            raise
        except Exception as error:
            here.leave(error)
            save_after_error()
            if interrupt.asked and isinstance(error, RuntimeError):
                raise Interrupted from None  # another process that left first breaks the communication of this one
            raise

    if here.is_main:
        write_stopped(run, state.step, stopped)
        if stopped is not None:
            print(f"stopped after step {state.step}: {stopped}", file=sys.stderr)
    best = here.gather(_best_weights(run, weights) if here.is_main else None)[0]
    if best is None:
        _save_weights(task, state, run / weights.result, here)
    elif here.is_main:
        with whole_directory(run / weights.result, checksums=True) as building:
            shutil.copytree(best, building, dirs_exist_ok=True)
    here.barrier()


def _step(task: Task, state: State, config: AnyConfig, abandonable: Abandonable, run: Path | None) -> Row:
    """Takes one step. Returns its row of metrics.jsonl, which is written there if there is a run."""
    began = time.perf_counter()
    means = task.step(state, abandonable)
    rate = learning_rate(config.optim, state.step)
    with state.changing():  # a step without its row is not complete
        state.step += 1
        state.images += config.train.global_batch_size
        row = {
            "step": state.step, **means, "lr": rate, "images": state.images, "skipped": state.skipped,
            "seconds": round(time.perf_counter() - began, 4),
        }  # fmt: skip
        if run is not None:
            journal.append_row(run / "metrics.jsonl", row)
    return row


def _measured(row: Row) -> str:
    names = {"reward": "held-out reward", "lpips": "LPIPS", "loss": "validation loss", "accuracy": "accuracy"}
    known = [(name, row.get(key)) for key, name in names.items()]
    return ", ".join(f"{name} {value:.4g}" for name, value in known if isinstance(value, float))


def _save_weights(task: Task, state: State, target: Path, here: World) -> None:
    with state.averaged():
        if not here.is_main:
            task.save(None)
            return
        with whole_directory(target, checksums=True) as building:
            task.save(building)


def _best_weights(run: Path, weights: WeightNames) -> Path | None:
    """The weights that best.json names, where these are the result."""
    if not weights.best or not (run / "best.json").is_file():
        return None
    step = json.loads((run / "best.json").read_text(encoding="utf-8"))["step"]
    return run / weights.each / step_name(step)


def _log(loggers: Sequence[journal.Logger], prefix: str, row: Row, step: int) -> None:
    numbers = {f"{prefix}{k}": float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
    for log in loggers:
        log(numbers, step)
