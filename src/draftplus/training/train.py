"""Training: one loop that reads from top to bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from draftplus.build import build_model, build_problem, build_rewards, compares_images, quiet_libraries
from draftplus.config import Config, to_dict
from draftplus.data.batches import check_batch_sizes, steps_of_epochs
from draftplus.data.prompts import load_prompts
from draftplus.distributed import World, world
from draftplus.errors import Interrupted, UserError
from draftplus.evaluation.held_out import EvaluationSet, evaluate, evaluation_set, same_images
from draftplus.evaluation.scores import Rewards
from draftplus.evaluation.variants import add_variants, check_checkpoints
from draftplus.progress import Advance, progress
from draftplus.runs import journal
from draftplus.runs.directory import forget_after, locked, saved_steps, step_name, write_config
from draftplus.runs.files import whole_directory
from draftplus.training import checkpoint
from draftplus.training.checkpoint import State
from draftplus.training.ddpo import ddpo_step
from draftplus.training.guards import stop_reason, write_best, write_stopped
from draftplus.training.interrupt import interruption
from draftplus.training.optim import Ema, learning_rate, make_optimizer
from draftplus.training.placement import check_mode
from draftplus.training.step import Abandonable, Setup, Shape, gradient_step
from draftplus.types import Model


def train(config: Config, run: Path) -> Path:
    """Trains as the configuration says, or continues, in the run directory `run`. Returns it.

    Raises UserError for a user's mistake, and Interrupted, once the last complete step is saved, where the process is
    asked to stop.
    """
    with world(config.device) as here:
        check_mode(config.parallel.mode)
        with locked(run) if here.is_main else nullcontext():
            _train(config, run, here)
    return run


def _train(config: Config, run: Path, here: World) -> None:
    micro = micro_batch_size(config, here.size)
    prompts = load_prompts(config.data.prompts)
    held_out = evaluation_set(config, prompts)
    total = total_steps(config, len(prompts.train))

    quiet_libraries()
    model = build_model(config.model, here.device, config.seed)
    rewards = build_rewards({**config.reward, **config.eval.rewards}, here.device)
    problem = build_problem(config, model, rewards)
    setup = Setup(config, problem, prompts.train, latent_shape(config, model), micro, here)
    state = initial_state(config, model)
    take_step = step_of(config)

    restored = checkpoint.restore(run / "checkpoints", state)
    if len(set(here.gather(state.step))) > 1:
        raise UserError(f"{run}: the processes found different checkpoints; output_dir must be shared by all machines")
    if here.is_main:
        forget_after(run, state.step if restored else -1)
        write_config(run, config)
    here.barrier()
    rows = here.gather(journal.read_rows(run / "eval.jsonl"))[0]
    evaluated = {row["step"] for row in rows}
    evaluations = comparable(rows, held_out, config)
    if here.is_main:
        write_best(run, evaluations, config.reward, config.stop)
        if stop_reason(evaluations, config.stop, config.eval.rewards) is None:  # it goes on
            write_stopped(run, state.step, None)
    check_checkpoints(config, evaluated, state.step)
    logs = here.is_main and (state.step < total or state.step not in evaluated)  # a finished run has nothing to say
    loggers = journal.open_loggers(config.log.to if logs else (), run, to_dict(config), state.step)

    with interruption() as interrupt, progress("training", total, here.is_main) as advance:
        try:
            while True:
                stopped = stop_reason(evaluations, config.stop, config.eval.rewards)
                last = state.step >= total or stopped is not None
                if state.step not in evaluated and (state.step % config.eval.every == 0 or last):
                    with _averaged(state), interrupt.abandonable():
                        row = _evaluate(model, state, rewards, held_out, config, run, here, advance)
                    evaluated.add(state.step)
                    evaluations.append(row)
                    if here.is_main:
                        _save_weights(model, state, run / "adapters" / step_name(state.step))
                        journal.append_row(run / "eval.jsonl", row)
                        write_best(run, evaluations, config.reward, config.stop)
                        _log(loggers, "held_out/", row, state.step)
                    continue  # what it found may end the run
                if state.step > 0 and (state.step % config.checkpoint.every == 0 or last):
                    _save(run, state, here, config)
                if last:
                    with _averaged(state), interrupt.abandonable():
                        note = _evaluation_note(state, held_out, here, advance)
                        add_variants(model, rewards, held_out, config, state.step, run, here, note)
                    break

                began = time.perf_counter()
                means = take_step(setup, state, interrupt.abandonable)
                rate = learning_rate(config.optim, state.step)
                state.step += 1
                state.images += config.train.global_batch_size
                row = {
                    "step": state.step, **means, "lr": rate, "images": state.images, "skipped": state.skipped,
                    "seconds": round(time.perf_counter() - began, 4),
                }  # fmt: skip
                if here.is_main:
                    journal.append_row(run / "metrics.jsonl", row)
                    _log(loggers, "train/", row, state.step)
                advance(state.step, f"reward {row['reward']:.3f}  kl {row['kl']:.2e}")
        except Interrupted:
            _save_interrupted(run, state, here, config)
            raise
        except RuntimeError:
            if not interrupt.asked:  # another process that left first breaks the communication of this one
                raise
            _save_interrupted(run, state, here, config)
            raise Interrupted from None

    if here.is_main:
        write_stopped(run, state.step, stopped)
        if stopped is not None:
            print(f"stopped after step {state.step}: {stopped}", file=sys.stderr)
        _save_weights(model, state, run / "adapter")
    here.barrier()


def comparable(rows: Sequence[journal.Row], which: EvaluationSet, config: Config) -> list[journal.Row]:
    """The evaluations of the images that `eval` asks for now: `eval` may have changed since the others.

    Raises UserError where a guard needs the base model's and has it of other images only.
    """
    kept = [row for row in rows if same_images(row, which)]
    for key, value in vars(config.stop).items():
        if value is not None and rows and (not kept or kept[0]["step"] != rows[0]["step"]):
            raise UserError(
                f"stop.{key}={value:g} compares with the evaluation of step {rows[0]['step']}, made with other prompts "
                f"or images than eval says now; set eval back to what it was, or stop.{key}=null"
            )
    return kept


def total_steps(config: Config, prompts: int) -> int:
    """Optimizer steps of a run over so many training prompts; epochs, where given, decide."""
    if config.train.epochs is not None:
        size, per_prompt = config.train.global_batch_size, config.data.images_per_prompt
        return steps_of_epochs(config.train.epochs, prompts, size, per_prompt)
    assert config.train.steps is not None
    return config.train.steps


def micro_batch_size(config: Config, ranks: int) -> int:
    """Images per backward pass: `train.micro_batch_size`, or a rank's whole share of an update where that is smaller.

    Raises UserError where ranks, DDPO's updates or micro-batches do not divide the batch, or a rank's share is too
    small for a reward that compares the images of a micro-batch.
    """
    sizes, objective = config.train, config.objective
    share = sizes.global_batch_size // ranks
    comparing = [name for name in config.reward if compares_images([name])]
    if comparing and share < min(sizes.micro_batch_size, sizes.global_batch_size):
        raise UserError(
            f"reward '{comparing[0]}' compares the images of a micro-batch, train.micro_batch_size="
            f"{sizes.micro_batch_size} of them, and each of {ranks} processes has {share}; "
            f"set train.micro_batch_size={max(1, share)}"
        )
    updates = objective.ddpo.updates if objective.method == "ddpo" else 1
    micro = min(sizes.micro_batch_size, max(1, sizes.global_batch_size // (ranks * updates)))
    check_batch_sizes(sizes.global_batch_size, micro, config.data.images_per_prompt, ranks, updates)
    return micro


def step_of(config: Config) -> Callable[[Setup, State, Abandonable], dict[str, float]]:
    """The function that takes one step of the configuration's method."""
    return ddpo_step if config.objective.method == "ddpo" else gradient_step


def initial_state(config: Config, model: Model) -> State:
    """The state of a run that has not begun."""
    parameters = model.trainable()
    average = Ema(parameters, config.optim.ema) if config.optim.ema else None
    return State(parameters, make_optimizer(parameters, config.optim), average)


def latent_shape(config: Config, model: Model) -> Shape:
    """(c, h, w) of one image's latents."""
    return model.latent_shape(config.sampler.height, config.sampler.width)


def _evaluate(
    model: Model, state: State, rewards: Rewards, held_out: EvaluationSet, config: Config, run: Path, here: World,
    advance: Advance,
) -> dict[str, Any]:  # fmt: skip
    note = _evaluation_note(state, held_out, here, advance)
    note(0, "")
    return evaluate(model, rewards, held_out, config, state.step, run, here, note)


def _evaluation_note(state: State, held_out: EvaluationSet, here: World, advance: Advance) -> Advance:
    total = len(held_out.jobs(here.rank, here.size))

    def show(done: int, _: str) -> None:
        advance(state.step, f"evaluating {done}/{total} images")

    return show


def _save_weights(model: Model, state: State, target: Path) -> None:
    with whole_directory(target) as building, _averaged(state):
        model.save_adapter(building)


def _averaged(state: State) -> AbstractContextManager[None]:
    return state.ema.applied(state.parameters) if state.ema else nullcontext()


def _save(run: Path, state: State, here: World, config: Config) -> None:
    if here.is_main and state.step not in saved_steps(run / "checkpoints"):
        checkpoint.save(run / "checkpoints", state, config.checkpoint.keep)


def _save_interrupted(run: Path, state: State, here: World, config: Config) -> None:
    if state.step > 0:
        _save(run, state, here, config)
    if here.is_main:
        print(f"stopped after step {state.step}; continue with: draftplus train {run}", file=sys.stderr)


def _log(loggers: list[journal.Logger], prefix: str, row: dict[str, Any], step: int) -> None:
    numbers = {f"{prefix}{k}": float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
    for log in loggers:
        log(numbers, step)
