"""Training: one loop that reads from top to bottom."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from draftplus.config import Config, to_dict
from draftplus.data.batches import batch, check_batch_sizes, steps_of_epochs
from draftplus.data.prompts import load_prompts
from draftplus.distributed import World, world
from draftplus.engine import checkpoint, journal
from draftplus.engine.build import build_model, build_problem, build_rewards, quiet_libraries
from draftplus.engine.checkpoint import State, step_name
from draftplus.engine.evaluate import EvaluationSet, Rewards, evaluate, evaluation_set
from draftplus.engine.files import whole_directory
from draftplus.engine.interrupt import interruption
from draftplus.engine.optim import Ema, gradient_norm, learning_rate, make_optimizer
from draftplus.engine.parallel import check_mode, reduce_step
from draftplus.engine.progress import Advance, progress
from draftplus.engine.run import forget_after, locked, write_best, write_config
from draftplus.engine.step import accumulate
from draftplus.engine.variants import add_variants, check_checkpoints
from draftplus.errors import Interrupted, UserError
from draftplus.types import Model

MOST_SKIPPED_IN_A_ROW = 10
FLOAT16_LOSS_SCALE = 2.0**12


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
    sizes = config.train
    micro = micro_batch_size(config, here.size)
    prompts = load_prompts(config.data.prompts)
    held_out = evaluation_set(config, prompts)
    total = total_steps(config, len(prompts.train))

    quiet_libraries()
    model = build_model(config.model, here.device, config.seed)
    rewards = build_rewards({**config.reward, **config.eval.rewards}, here.device)
    problem = build_problem(config, model, rewards)
    shape = model.latent_shape(config.sampler.height, config.sampler.width)
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, config.optim)
    state = State(parameters, optimizer, Ema(parameters, config.optim.ema) if config.optim.ema else None)

    restored = checkpoint.restore(run / "checkpoints", state)
    if len(set(here.gather(state.step))) > 1:
        raise UserError(f"{run}: the processes found different checkpoints; output_dir must be shared by all machines")
    if here.is_main:
        forget_after(run, state.step if restored else -1)
        write_config(run, config)
        write_best(run, config.reward)
    here.barrier()
    evaluated = here.gather({row["step"] for row in journal.read_rows(run / "eval.jsonl")})[0]
    check_checkpoints(config, evaluated, state.step)
    logs = here.is_main and (state.step < total or state.step not in evaluated)  # a finished run has nothing to say
    loggers = journal.open_loggers(config.log.to if logs else (), run, to_dict(config), state.step)

    with interruption() as interrupt, progress("training", total, here.is_main) as advance:
        try:
            while True:
                last = state.step >= total
                if state.step not in evaluated and (state.step % config.eval.every == 0 or last):
                    with _averaged(state), interrupt.abandonable():
                        row = _evaluate(model, state, rewards, held_out, config, run, here, advance)
                    evaluated.add(state.step)
                    if here.is_main:
                        _save_weights(model, state, run / "adapters" / step_name(state.step))
                        journal.append_row(run / "eval.jsonl", row)
                        write_best(run, config.reward)
                        _log(loggers, "held_out/", row, state.step)
                if state.step > 0 and (state.step % config.checkpoint.every == 0 or last):
                    _save(run, state, here, config)
                if last:
                    with _averaged(state), interrupt.abandonable():
                        note = _evaluation_note(state, held_out, here, advance)
                        add_variants(model, rewards, held_out, config, state.step, run, here, note)
                    break

                began = time.perf_counter()
                with interrupt.abandonable():
                    share = batch(
                        prompts.train, state.step, config.seed, sizes.global_batch_size, config.data.images_per_prompt,
                        here.rank, here.size,
                    )  # fmt: skip
                    metrics = accumulate(
                        problem, share, shape, config.seed, state.step, sizes.global_batch_size, micro,
                        sizes.sampling_batch_size, FLOAT16_LOSS_SCALE if config.model.dtype == "float16" else 1.0,
                    )  # fmt: skip
                    means = metrics.named(reduce_step(list(parameters.values()), metrics.vector, here))

                row = _update(state, config, means)
                row["seconds"] = round(time.perf_counter() - began, 4)
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
        _save_weights(model, state, run / "adapter")
    here.barrier()


def total_steps(config: Config, prompts: int) -> int:
    """Optimizer steps of a run over so many training prompts; epochs, where given, decide."""
    if config.train.epochs is not None:
        size, per_prompt = config.train.global_batch_size, config.data.images_per_prompt
        return steps_of_epochs(config.train.epochs, prompts, size, per_prompt)
    assert config.train.steps is not None
    return config.train.steps


def micro_batch_size(config: Config, ranks: int) -> int:
    """Images per backward pass: `train.micro_batch_size`, or a rank's whole share of the batch where that is smaller.

    Raises UserError where ranks or micro-batches do not divide the batch.
    """
    sizes = config.train
    micro = min(sizes.micro_batch_size, max(1, sizes.global_batch_size // ranks))
    check_batch_sizes(sizes.global_batch_size, micro, config.data.images_per_prompt, ranks)
    return micro


def _update(state: State, config: Config, means: dict[str, float]) -> dict[str, Any]:
    """One optimizer step from the gradients that are there; a non-finite one is skipped and counted."""
    norm = gradient_norm(state.parameters, config.optim.grad_clip)
    rate = learning_rate(config.optim, state.step)
    if math.isfinite(norm) and math.isfinite(means["loss"]):
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.parameters)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        _refuse_non_finite(state, means, norm)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.images += config.train.global_batch_size
    return {
        "step": state.step, **means, "grad_norm": norm, "lr": rate, "images": state.images, "skipped": state.skipped,
    }  # fmt: skip


def _refuse_non_finite(state: State, means: dict[str, float], norm: float) -> None:
    if state.step > 0 and state.skipped_in_a_row < MOST_SKIPPED_IN_A_ROW:
        return
    bad = [name for name, value in {**means, "grad_norm": norm}.items() if not math.isfinite(value)]
    rewards = [name for name in bad if name.startswith("reward/")]
    when = "at the first step" if state.step == 0 else f"in {MOST_SKIPPED_IN_A_ROW} steps in a row"
    what = f"reward '{rewards[0].removeprefix('reward/')}' is" if rewards else f"{', '.join(bad)} is"
    mend = "look at what it returns for images in [0, 1]" if rewards else "lower optim.lr, or use model.dtype=float32"
    raise UserError(f"{what} not finite {when} (step {state.step + 1}); {mend}. Nothing of this step was kept")


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
    if here.is_main and state.step not in checkpoint.saved_steps(run / "checkpoints"):
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
