"""What a run would do and how long it would take, without doing it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

from draftplus.build import build_model, build_problem, build_rewards, quiet_libraries
from draftplus.config import Config, to_yaml
from draftplus.data.prompts import load_prompts
from draftplus.diffusion.objectives import Problem, plan
from draftplus.diffusion.policy import random_steps
from draftplus.distributed import world
from draftplus.evaluation.held_out import evaluation_set
from draftplus.training.placement import check_mode
from draftplus.training.step import Setup
from draftplus.training.train import initial_state, latent_shape, micro_batch_size, step_of, total_steps


def describe(config: Config, run: Path) -> str:
    """The resolved configuration, trainable parameters, passes per step and expected time, as text.

    The time is that of one real step, whose result is thrown away.

    Raises UserError for everything that `train` would refuse before its first step.
    """
    sizes = config.train
    with world(config.device) as here:
        check_mode(config.parallel.mode)
        micro = micro_batch_size(config, here.size)
        prompts = load_prompts(config.data.prompts)
        held_out = evaluation_set(config, prompts)
        quiet_libraries()
        model = build_model(config.model, here.device, config.seed)
        problem = build_problem(config, model, build_rewards({**config.reward, **config.eval.rewards}, here.device))
        setup = Setup(config, problem, prompts.train, latent_shape(config, model), micro, here)
        state = initial_state(config, model)
        began = time.perf_counter()
        step_of(config)(setup, state, nullcontext)
        seconds = time.perf_counter() - began
    total = total_steps(config, len(prompts.train))
    plain, graded = _passes(config, problem)
    parameters = sum(parameter.numel() for parameter in problem.model.trainable().values())
    evaluations = 1 + -(-total // config.eval.every) + sum("checkpoint" not in one for one in config.eval.variants)
    images = len(held_out.prompts) * held_out.images_per_prompt
    # an evaluated image costs its denoising steps, much like an image of a training step
    evaluating = evaluations * images / sizes.global_batch_size * seconds
    return "\n".join(
        [
            to_yaml(config).rstrip(),
            "",
            f"run directory         {run}",
            f"trained parameters    {parameters:,}",
            f"prompts               {len(prompts.train)} to train on, {len(held_out.prompts)} held out",
            f"passes per image      {plain} without gradient, {graded} with gradient, "
            f"{graded if config.objective.kl_coeff > 0 else 0} of the frozen model"
            + (", each doubled by guidance" if config.sampler.guidance_scale > 1 else ""),
            f"expected time         {_clock(total * seconds + evaluating)}: {total} steps of {seconds:.1f} s, "
            f"{evaluations} evaluations of {images} images",
        ]
    )


def _passes(config: Config, problem: Problem) -> tuple[int, int]:
    """Passes of the denoiser for one image of a step, without and with gradient."""
    objective, total = config.objective, len(problem.schedule)
    if objective.method == "ddpo":
        return total, objective.ddpo.inner_epochs * len(random_steps(problem.schedule, problem.eta))
    window = plan(objective, total, config.seed, 0)
    ends = (window.x0_at if window.x0_at is not None else total - 1) + 1
    copies = objective.draft_lv.samples if objective.method == "draft_lv" else 0
    return ends - len(window.steps), len(window.steps) + copies


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
