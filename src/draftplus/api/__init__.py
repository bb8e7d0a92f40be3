"""What a command does, a function does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftplus.config import Config, ModelConfig, RewardConfig, trusting
from draftplus.errors import UserError
from draftplus.evaluation.knobs import Knobs
from draftplus.garbage import collection_paused
from draftplus.launcher import is_main_process
from draftplus.runs.plan import plan_run

if TYPE_CHECKING:  # each function imports what it needs: a sweep that is planned needs no torch, a training no pages
    from torch import Tensor

    from draftplus.planning.plan import Plan as MemoryPlan
    from draftplus.sweeps.ahead import Ahead
    from draftplus.sweeps.plan import Plan
    from draftplus.sweeps.slurm_options import SlurmOptions
    from draftplus.types import Model, Reward


def load_model(path: str = "emoji", device: str = "auto", adapter: str | Path | None = None) -> Model:
    """A model to sample. path: built-in name, diffusers directory, hub id or single file.

    adapter: a run's adapter/, or any LoRA that stock diffusers loads, a file or its directory.

    Raises UserError where it is missing or of a family without an adapter.
    """
    from draftplus.build import build_model, quiet_libraries
    from draftplus.distributed import pick_device

    quiet_libraries()
    model = build_model(ModelConfig(path=path), pick_device(device), trainable=False)
    if adapter is not None:
        model.tuned.load(Path(adapter))
    return model


def load_reward(
    name: str, path: str | None = None, args: Mapping[str, Any] | None = None, device: str = "auto"
) -> Reward:
    """A reward by its built-in name, or `package.module:object`. It scores (b, 3, H, W) images in [0, 1] to (b,).

    Raises UserError where it is not known or its weights are missing.
    """
    from draftplus.build import build_reward, quiet_libraries
    from draftplus.distributed import pick_device

    quiet_libraries()
    return build_reward(name, RewardConfig(path=path, args=dict(args or {})), pick_device(device))


def train(recipe: Config | str | Path = "emoji", overrides: Sequence[str] = (), trust: bool = False) -> Path:
    """Trains, or continues, and writes the report, at each evaluation too. Returns the run directory.

    recipe: a configuration, a recipe's name or file, or a run directory. overrides: `key=value` strings. trust: whether
    code may run that a file names as a reward; a configuration and overrides are the caller's own.

    Raises UserError for a user's mistake.
    """
    with trusting(trust):
        config, run = plan_run(recipe, overrides)
    _train(config, run, report_so_far)
    if is_main_process():
        write_report(run)
    return run


def report_so_far(run: Path) -> None:
    """Writes the report of a run that goes on, so that it can be looked at. No fault of a page ends a training."""
    try:
        write_report(run)
    except Exception as error:
        print(f"{run / 'report.html'} is not written: {error}; the training goes on", file=sys.stderr)


def describe(recipe: Config | str | Path = "emoji", overrides: Sequence[str] = (), trust: bool = False) -> str:
    """What `train` would do with these arguments: the resolved configuration, the passes of a step, and the time.

    It takes one step, whose result is thrown away.

    Raises UserError for everything that `train` would reject before its first step.
    """
    with trusting(trust):
        config, run = plan_run(recipe, overrides)
    return _describe(config, run)


def plan(
    recipe: Config | str | Path = "emoji",
    overrides: Sequence[str] = (),
    memory: str | int | None = None,
    gpus: int = 1,
    trust: bool = False,
) -> MemoryPlan:
    """What `train` would take in memory with these arguments; no weights are loaded.

    memory: of one device, such as "24GB", or bytes; with it the plan says what fits, and what to switch on where the
    run does not. gpus: how many processes share a step's images.

    Raises UserError for a user's mistake.
    """
    from draftplus.planning.plan import bytes_of, configured, plan_memory

    limit = bytes_of(memory) if isinstance(memory, str) else memory
    with trusting(trust):
        return plan_memory(configured(recipe, overrides), limit, gpus)


def generate(
    target: str,
    prompts: Sequence[str],
    seeds: Iterable[int] = range(4),
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
    lora_scale: float = 1.0,
    anneal: str | None = None,
) -> Tensor:
    """Images (len(prompts) * len(seeds), 3, H, W) in [0, 1], a prompt's images next to one another.

    target: a model, a run directory, RUN@step or RUN@best. overrides: `key=value` strings, such as sampler.steps=25.

    Raises UserError for a user's mistake.
    """
    from draftplus.evaluation.gallery import make_gallery

    jobs = (target, prompts, list(seeds), overrides, None if adapter is None else Path(adapter))
    return make_gallery(*jobs, Knobs(lora_scale, anneal)).images


def write_images(
    output: str | Path,
    target: str,
    prompts: Sequence[str],
    seeds: Iterable[int] = range(4),
    overrides: Sequence[str] = (),
    adapter: str | Path | None = None,
    lora_scale: float = 1.0,
    anneal: str | None = None,
    rewards: Sequence[str] = (),
    trust: bool = False,
) -> list[dict[str, Any]]:
    """Makes the images of `generate`, scores them by rewards, and writes them to a directory with their grid. trust: as
    for `train`.

    Returns the rows of `output`/images.jsonl, one for each image: file, prompt, seed, and reward/<name>.

    Raises UserError for a user's mistake.
    """
    from draftplus.evaluation.gallery import write_gallery

    jobs = (target, prompts, list(seeds), overrides, None if adapter is None else Path(adapter))
    with trusting(trust):
        return write_gallery(Path(output), *jobs, Knobs(lora_scale, anneal), rewards)


def evaluate(
    targets: str | Sequence[str],
    overrides: str | Sequence[str] = (),
    prompts: str | Sequence[str] | None = None,
    images_per_prompt: int | None = None,
    seeds: Iterable[int] | None = None,
    rewards: str | Sequence[str] = (),
    metrics: str | Sequence[str] = (),
    features: str | None = None,
    lora_scale: float = 1.0,
    anneal: str | None = None,
    output: str | Path = "evaluated",
    latents: str | Path | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Measures models, runs (RUN, RUN@step, RUN@best) and adapters (files, directories) on the same prompts and seeds.

    prompts: None: those that the first run holds out, or for models alone the built-in animals that are held out.
    images_per_prompt: None: as that run evaluates; image i of prompt p has seed p * images_per_prompt + i. seeds:
    instead of these, for every prompt. rewards: besides those that the runs train and hold out. metrics: names of
    `build.METRICS` or rewards; none: LPIPS, and for the embedded model entropy and divergence of styles. Of each
    of these lists, one text stands for a list of it. features: the `CLIPModel` of metrics that need one, the embedded
    one unless given. lora_scale, anneal: for all that has trained weights. The base model is always measured too.
    trust: as for `train`.

    Returns what is in `output`/eval.json, beside which the pictures lie. Images that were made before, for the same
    files and settings, are not made again, if their latents are in `latents`, which is `output`/latents unless given.

    Raises UserError for a user's mistake.
    """
    from draftplus.evaluation.evaluate import compare

    with trusting(trust):
        return compare(
            listed(targets), listed(overrides), Path(output), None if prompts is None else listed(prompts),
            images_per_prompt, list(seeds) if seeds is not None else None, listed(rewards), listed(metrics),
            features, Knobs(lora_scale, anneal), None if latents is None else Path(latents),
        )  # fmt: skip


def listed(texts: str | Sequence[str]) -> list[str]:
    """A list of texts, of one text a list of it."""
    return [texts] if isinstance(texts, str) else list(texts)


def export(target: str, format: str = "diffusers", output: str | Path | None = None) -> Path:
    """Writes a run's trained weights for other programs, with a model card and pictures. Returns their directory.

    target: RUN, RUN@step or RUN@best. format: "diffusers": as the run has them. "kohya": a LoRA file for ComfyUI,
    AUTOMATIC1111, Forge, InvokeAI and sd-scripts. "merged": a whole pipeline, the adapter added to the weights in
    float32 and these in the precision of the base model's. output: a directory; None: below the run's export/. What an
    earlier export left there is replaced as a whole.

    Raises UserError for a user's mistake, such as an output with something else in it.
    """
    from draftplus.publish import export_run

    return export_run(target, format, None if output is None else Path(output))


def sweep(
    recipe: str | Path = "emoji",
    grid: Mapping[str, Any] | None = None,
    name: str | None = None,
    directory: str | Path = "sweeps",
    jobs: int | None = None,
    trust: bool = False,
    slurm: str | None = None,
) -> Path:
    """Trains a grid of runs, each in a process of its own, and writes the report. Returns the sweep's directory.

    recipe: a recipe's name or file, or a sweep file. grid: each key's values, such as {"objective.kl_coeff": [0, 1],
    "seed": range(3)}; a value that is itself a list stands in a list of its own. What became of each run is in
    manifest.json; the same call again goes on where it was stopped. jobs: how many runs train at the same time; one on
    each GPU, or one, unless given. trust: as for `train`. slurm: `key=value,...`; each run is a job of a Slurm cluster
    then, as with --slurm.

    Raises UserError for a user's mistake, before any run starts, and Interrupted where the process is asked to stop.
    """
    from draftplus.sweeps.grid import written_grid
    from draftplus.sweeps.plan import plan_sweep
    from draftplus.sweeps.slurm_options import read_options

    options = read_options(slurm) if slurm is not None else None
    with trusting(trust):
        planned = plan_sweep(recipe, written_grid(grid or {}, "grid"), name, Path(directory))
    run_planned(planned, jobs, options)
    return planned.directory


def run_planned(
    planned: Plan, jobs: int | None = None, slurm: SlurmOptions | None = None, ahead: Ahead | None = None
) -> Path | None:
    """Trains the runs of a plan that are not finished, `jobs` at a time, here or as Slurm jobs with these options.
    ahead: as for `LocalRunner`.

    Returns the report's path; None where no run left anything.
    """
    from draftplus.sweeps.launch import run_sweep
    from draftplus.sweeps.local import LocalRunner
    from draftplus.sweeps.slurm import SlurmRunner

    runner = LocalRunner(planned, jobs, ahead) if slurm is None else SlurmRunner(planned, slurm, jobs)
    manifest = run_sweep(planned, runner)
    try:
        return write_report(planned.directory)
    except UserError:
        if all(entry.status == "failed" for entry in manifest.runs):  # and left nothing; why is told run by run
            return None
        raise


def write_report(target: Path) -> Path:
    from draftplus.report import write_report

    return write_report(target)


def _train(config: Config, run: Path, told: Callable[[Path], None]) -> Path:
    with collection_paused():
        from draftplus.training.train import train

    return train(config, run, told)


def _describe(config: Config, run: Path) -> str:
    from draftplus.training.dry_run import describe

    return describe(config, run)
