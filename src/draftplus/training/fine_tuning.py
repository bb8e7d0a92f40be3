"""Fine-tuning a diffusion model on a reward, as a task of the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from draftplus.build import build_model, build_problem, build_rewards, quiet_libraries, weighted_sum
from draftplus.config import Config
from draftplus.data.batches import visited
from draftplus.data.prompts import load_prompts
from draftplus.diffusion.methods import METHODS, learns_from_the_end
from draftplus.diffusion.overflow import Overflow
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.schedule import make_schedule
from draftplus.distributed import World
from draftplus.errors import UserError, needs_memory, notice
from draftplus.evaluation.embedding import embed_prompts
from draftplus.evaluation.held_out import evaluate_held_out
from draftplus.evaluation.held_out_set import EvaluationSet, evaluation_set, same_images
from draftplus.evaluation.knobs import Job
from draftplus.evaluation.scale import base_jobs, measured_scales, read_scales, write_scales
from draftplus.evaluation.scores import Rewards
from draftplus.evaluation.variants import add_variants, check_checkpoints
from draftplus.metrics.lpips import SMALLEST
from draftplus.progress import Advance, progress
from draftplus.rewards.combined import Combined, Scale
from draftplus.rewards.offloaded import offloaded
from draftplus.runs.directory import saved_steps
from draftplus.runs.inputs import same_inputs
from draftplus.runs.journal import Row
from draftplus.runs.origin import write_origin
from draftplus.training.ddpo import ddpo_step
from draftplus.training.guards import stop_reason, write_best
from draftplus.training.optim import Parameters
from draftplus.training.placement import Placement, Sharded
from draftplus.training.reuse import PrefixCache, sources
from draftplus.training.sizes import micro_batch_size, total_steps
from draftplus.training.state import State
from draftplus.training.step import Setup, gradient_step, what_overflowed
from draftplus.training.task import Abandonable
from draftplus.training.warm_up import eagerly, warm_up
from draftplus.types import Model

FAINT = 0.05  # a noise level of the last step that leaves little of a gradient


@dataclass(frozen=True)
class FineTuning:
    """The task. rewards: those that are trained on and those that are held out, by name. sum: what is optimised.
    inputs: `same_inputs`."""

    setup: Setup
    rewards: Rewards
    sum: Combined
    held_out: EvaluationSet
    run: Path
    total: int
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return self.setup.problem.model

    @property
    def parameters(self) -> Parameters:
        return self.model.tuned.trainable()

    def step(self, state: State, abandonable: Abandonable) -> dict[str, float]:
        differentiates = METHODS[self.setup.config.objective.method].differentiates
        try:
            with needs_memory(f"step {state.step + 1}, whose micro-batches have {self.setup.micro} images"):
                return (gradient_step if differentiates else ddpo_step)(self.setup, state, abandonable)
        except Overflow as error:
            # in parts, the processes would wait for passes that one of them, who has found it, does not make
            found = None
            if not isinstance(self.setup.placement, Sharded):
                with eagerly(self.setup.config.train.compile):
                    found = what_overflowed(self.setup, state.step)
            raise UserError(f"at step {state.step + 1}: {found or error}") from None

    def note(self, row: Row) -> str:
        return f"reward {row['reward']:.3f}, kl {row['kl']:.2e}"

    def evaluate(self, step: int, advance: Advance) -> Row:
        note = self._evaluating(step, advance)
        note(0, "")
        with eagerly(self.setup.config.train.compile):
            return evaluate_held_out(
                self.model, self.rewards, self.sum.total, self.held_out, self.setup.config, step, self.run,
                self.setup.here, note,
            )  # fmt: skip

    def comparable(self, rows: Sequence[Row]) -> list[Row]:
        """The evaluations of the images that `eval` now specifies: it may have changed since the others.

        Raises UserError if a guard needs the base model's evaluation, and that is of other images.
        """
        kept = [row for row in rows if same_images(row, self.held_out)]
        for key, value in vars(self.setup.config.stop).items():
            if value is not None and rows and (not kept or kept[0]["step"] != rows[0]["step"]):
                raise UserError(
                    f"stop.{key}={value:g} compares with the evaluation of step {rows[0]['step']}, which used "
                    "other prompts or images than eval now specifies; restore the previous eval settings, or set "
                    f"stop.{key}=null"
                )
        return kept

    def stop_reason(self, rows: Sequence[Row]) -> str | None:
        return stop_reason(rows, self.setup.config.stop, self.setup.config.eval.rewards)

    def write_best(self, rows: Sequence[Row]) -> None:
        write_best(self.run, rows, self.setup.config.reward, self.setup.config.stop)

    def save(self, directory: Path | None) -> None:
        tensors = self.setup.placement.gather(self.model.tuned.state())
        if directory is not None and tensors is not None:
            self.model.tuned.write(directory, tensors)

    def before(self, evaluated: Sequence[int], step: int) -> None:
        check_checkpoints(self.setup.config, evaluated, step)
        if self.setup.here.is_main:
            last_sigma = self.setup.problem.sampler.schedule.last_sigma
            write_origin(self.run, self.setup.config, self.inputs, step, last_sigma)

    def finish(self, step: int, advance: Advance) -> None:
        """Measures `eval.variants`."""
        note = self._evaluating(step, advance)
        with eagerly(self.setup.config.train.compile):
            add_variants(
                self.model, self.rewards, self.sum.total, self.held_out, self.setup.config, step, self.run,
                self.setup.here, note,
            )  # fmt: skip

    def _evaluating(self, step: int, advance: Advance) -> Advance:
        here = self.setup.here
        total = len(self.held_out.jobs(here.rank, here.size))

        def show(done: int, _: str) -> None:
            advance(step, f"evaluating {done}/{total} images")

        return show


def fine_tuning(config: Config, run: Path, placement: Placement, here: World, dry: bool = False) -> FineTuning:
    """Builds the task of a configuration, with its prompts embedded and its model placed. dry: for the first step only.

    Raises UserError for everything that is wrong with the configuration, the model, the rewards or the prompts.
    """
    micro = micro_batch_size(config, here.size)
    prompts = load_prompts(config.data.prompts, config.data.column)
    held_out = evaluation_set(config, prompts)
    quiet_libraries()
    total = total_steps(config, len(prompts.train))
    with progress("loading the model", None, here.is_main):
        model = build_model(config.model, here.device, config.seed, denoiser_on=placement.loads_on)
    # the text encoders are gone before the denoiser trains
    steps = range(1) if dry else range(min(saved_steps(run / "checkpoints"), default=0), total)
    per_step = (config.train.global_batch_size, config.data.images_per_prompt)
    batches = sources(config.train.prefix_cache, steps, config.seed)
    trained_on = visited(prompts.train, batches, config.seed, *per_step)
    jobs = base_jobs(config, prompts.train)
    others = [] if dry else [*held_out.prompts, *(job.prompt for job in jobs)]
    embed_prompts(model, [*trained_on, *others, config.sampler.negative_prompt], here)
    with progress("loading the denoiser", None, here.is_main):
        placement.place(model)
    compiled = config.train.compile and len(steps) > 0
    if compiled:
        model.compile()
    with progress("loading the rewards", None, here.is_main):
        named = {**config.reward, **config.eval.rewards}
        with placement.loading():
            rewards = build_rewards(named, here.device, placement.loads_on, placement.place_reward)
        rewards = offloaded(rewards, model.offload)
    problem = build_problem(config, model, rewards)
    for key, side in (("sampler.height", config.sampler.height), ("sampler.width", config.sampler.width)):
        if side is not None and side < SMALLEST:
            raise UserError(f"{key} is {side}; evaluation compares pictures by LPIPS, which needs {SMALLEST} pixels")
    shape = model.latent_shape(config.sampler.height, config.sampler.width)
    _tell_of_faint_gradient(config, problem)
    inputs = same_inputs(config, run, prompts.train, here)
    with eagerly(compiled):
        scales = {} if dry else _scales(config, run, model, rewards, jobs, here)
    weighted = weighted_sum(config, rewards, scales)
    reuse = config.train.prefix_cache
    cache = PrefixCache(reuse.batches) if reuse.uses > 1 else None
    setup = Setup(config, replace(problem, scorer=weighted), prompts.train, shape, micro, here, placement, cache)
    if compiled:
        with progress("compiling the denoiser", None, here.is_main):
            warm_up(setup, steps)
    return FineTuning(setup, rewards, weighted, held_out, run, total, inputs)


def _scales(
    config: Config, run: Path, model: Model, rewards: Rewards, jobs: Sequence[Job], here: World
) -> dict[str, Scale]:
    """The scales of the rewards that are normalised: those of the run that goes on, or else measured and kept."""
    goes_on = bool(saved_steps(run / "checkpoints"))
    scales: dict[str, Scale] | None = here.gather(read_scales(run, config) if goes_on else None)[0]
    if scales is None:
        scales = measured_scales(model, rewards, config, jobs, here) if jobs else {}
        if here.is_main:
            write_scales(run, scales)
    return scales


def _tell_of_faint_gradient(config: Config, problem: Problem) -> None:
    """One line where the last sampling step alone carries gradient, and a flow model's schedule leaves little of it."""
    schedule, size = problem.sampler.schedule, (config.sampler.height, config.sampler.width)
    here = schedule.last_sigma
    if schedule.prediction != "flow" or here >= FAINT or not learns_from_the_end(config, schedule):
        return
    file = problem.model.scheduler(problem.model.latent_shape(*size), len(schedule))
    spaced = make_schedule(file, len(schedule), config.sampler.solver, "linear")[0].last_sigma
    mend = "let more steps carry gradient, such as objective.method=draft objective.grad_steps=3"
    if spaced >= FAINT:
        mend = f"sampler.spacing=linear makes it {spaced:.2g}"
    notice(
        f"only the last sampling step carries gradient, and its noise level σ = {here:.2g} multiplies the reward's "
        f"gradient; {mend}"
    )
