"""What a run would do and how long it would take, without doing it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

from draftplus.config import Config, RewardTrainConfig, to_yaml
from draftplus.data.pair_split import evenly, is_tie
from draftplus.data.pairs import caption_key
from draftplus.diffusion.methods import METHODS
from draftplus.diffusion.objectives import plan
from draftplus.diffusion.problem import Problem
from draftplus.distributed import world
from draftplus.evaluation.scale import base_jobs, normalised
from draftplus.training.fine_tuning import fine_tuning
from draftplus.training.optim import tell_of_idle_steps
from draftplus.training.placement import make_placement
from draftplus.training.preference import preference
from draftplus.training.state import initial_state


def describe(config: Config, run: Path) -> str:
    """The resolved configuration, trainable parameters, passes per step and expected time, as text.

    The time is that of one real step, whose result is thrown away.

    Raises UserError for everything that `train` would refuse before its first step.
    """
    with world(config.device, config.parallel.timeout) as here:
        task = fine_tuning(config, run, make_placement(config.parallel, here), here, dry=True)
        state = initial_state(task.parameters, config.optim)
        began = time.perf_counter()
        task.step(state, nullcontext)
        seconds = time.perf_counter() - began
        uses = config.train.prefix_cache.uses
        if uses > 1:  # the same start noises once more
            began = time.perf_counter()
            task.step(state, nullcontext)
            seconds = (seconds + (uses - 1) * (time.perf_counter() - began)) / uses
    tell_of_idle_steps(config.optim, task.total)
    setup, held_out, sampler = task.setup, task.held_out, task.setup.problem.sampler
    doubled = sampler.model.doubles(sampler.negative_prompt, sampler.guidance_scale)
    gate, total = sampler.gate, len(sampler.schedule)
    plain, graded, frozen = passes(setup.problem, config.seed)
    saved = f", once for {uses} uses of a start noise: {plain - gate} passes without gradient at the others"
    parameters = sum(parameter.numel() for parameter in task.parameters.values())
    evaluations = 1 + -(-task.total // config.eval.every) + sum("checkpoint" not in one for one in config.eval.variants)
    images = len(held_out.prompts) * held_out.images_per_prompt
    # an evaluated image costs its denoising steps, much like an image of a training step
    scaled, scaling = normalised(config), len(base_jobs(config, setup.prompts))
    evaluating = (evaluations * images + scaling) / config.train.global_batch_size * seconds
    told = [f"normalised rewards    {', '.join(scaled)}: measured first, on {scaling} pictures of the base model"]
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"run directory         {run}",
            f"method                {METHODS[config.objective.method].label}",
            f"trained parameters    {parameters:,}",
            f"prompts               {len(setup.prompts)} to train on, {len(held_out.prompts)} held out",
            *(told if scaled else []),
            f"last sampling step    at noise level σ = {sampler.schedule.last_sigma:.2g}, of x_t = α x_0 + σ ε",
            f"passes per image      {plain} without gradient, {graded} with gradient, {frozen} of the frozen model"
            + (", each doubled by guidance" if doubled else ""),
            *(
                [
                    f"gate                  the frozen model draws the first {gate} of {total} steps"
                    + (saved if uses > 1 else "")
                ]
                if gate
                else []
            ),
            f"expected time         {_clock(task.total * seconds + evaluating)}: {task.total} steps of "
            f"{seconds:.1f} s, {evaluations} evaluations of {images} images",
        ]
    )


def describe_reward(config: RewardTrainConfig, run: Path) -> str:
    """The same of a training of a reward."""
    with world(config.device, config.parallel.timeout) as here:
        task = preference(config, run, make_placement(config.parallel, here), here)
        state = initial_state(task.parameters, config.optim)
        began = time.perf_counter()
        task.step(state, nullcontext)
        seconds = time.perf_counter() - began
    tell_of_idle_steps(config.optim, task.total)
    split, validations = task.split, 1 + -(-task.total // config.eval.every)
    validated = len(evenly(split.validation_rows, config.eval.max_pairs))
    # without gradient a pair costs a third
    validating = validations * validated / config.train.global_batch_size * seconds / 3
    ties = sum(is_tie(split.train.label(row)) for row in split.train_rows)
    captions = [len({caption_key(pairs.caption(row)) for row in rows}) for pairs, rows in split.sides()]
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"run directory         {run}",
            f"trained parameters    {sum(parameter.numel() for parameter in task.parameters.values()):,}",
            f"pairs                 {len(split.train_rows)} to train on, of {captions[0]} captions; {ties} ties",
            f"validation            {validated} pairs of {captions[1]} captions",
            f"expected time         {_clock(task.total * seconds + validating)}: {task.total} steps of "
            f"{seconds:.1f} s, {validations} validations",
        ]
    )


def passes(problem: Problem, seed: int) -> tuple[int, int, int]:
    """Passes of the denoiser for one image of a step: without gradient, with gradient, and of the frozen model.

    Those without gradient draw the image, before the gate by the frozen model. The last are those of regularisers.
    """
    objective, schedule = problem.objective, problem.sampler.schedule
    method, planned = METHODS[objective.method], plan(objective, schedule, seed, 0)
    window, end = planned.window, len(schedule) if planned.window.x0_at is None else planned.window.x0_at + 1
    copies = method.copies(objective)
    within = {step for step in planned.keep if step < end}  # evaluated once more for a regulariser
    repeats = method.repeats(objective)
    graded = repeats * (len(window.steps) + copies + len(within))
    looked = {*window.steps, *within}
    frozen = repeats * sum(
        len(looked.intersection(steps)) + copies * (window.steps[-1] in steps)  # copies are of the window's step
        for steps in planned.looks.values()
    )
    return end - len(window.steps) if method.differentiates else end, graded, frozen


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
