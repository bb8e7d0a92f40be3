"""What a command does, a function does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from draftplus.build import build_model, build_reward, quiet_libraries
from draftplus.config import Config, ModelConfig, RewardConfig, RewardTrainConfig, trusting
from draftplus.data.pack import PackRules
from draftplus.data.pack import pack_prompts as _pack_prompts
from draftplus.data.show import describe_prompts
from draftplus.distributed import is_main_process, pick_device
from draftplus.errors import UserError
from draftplus.evaluation.evaluate import compare
from draftplus.evaluation.gallery import make_gallery, write_gallery
from draftplus.evaluation.generate import Knobs
from draftplus.evaluation.score import score as _score
from draftplus.evaluation.score_pairs import score_pairs as _score_pairs
from draftplus.publish import export_run
from draftplus.report import write_report
from draftplus.rewards.nemo import convert_nemo
from draftplus.runs.plan import plan_reward_run, plan_run
from draftplus.sweeps.grid import written_grid
from draftplus.sweeps.launch import run_sweep
from draftplus.sweeps.plan import Plan, plan_sweep
from draftplus.training.dry_run import describe as _describe
from draftplus.training.dry_run import describe_reward as _describe_reward
from draftplus.training.train import train as _train
from draftplus.training.train import train_reward as _train_reward
from draftplus.types import Model, Reward


def load_model(path: str = "emoji", device: str = "auto", adapter: str | Path | None = None) -> Model:
    """A model to sample. path: built-in name, diffusers directory, hub id or single file.

    adapter: a run's adapter/, or any LoRA that stock diffusers loads, a file or its directory.

    Raises UserError where it is missing or of a family without an adapter.
    """
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
    _train(config, run, _report_so_far)
    if is_main_process():
        write_report(run)
    return run


def train_reward(target: RewardTrainConfig | str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Trains a reward on preference pairs, or continues, and writes the report. Returns the run directory, in which
    reward/ is a `CLIPModel` directory, the best by validation: `reward.clip.path` loads it.

    target: a configuration, a file of pairs, a YAML file, or a run directory. overrides: `key=value` strings.

    Raises UserError for a user's mistake.
    """
    config, run = plan_reward_run(target, overrides)
    _train_reward(config, run, _report_so_far)
    if is_main_process():
        write_report(run)
    return run


def describe_reward(target: RewardTrainConfig | str | Path | None = None, overrides: Sequence[str] = ()) -> str:
    """What `train_reward` would do with these arguments. It takes one step, whose result is thrown away.

    Raises UserError for everything that `train_reward` would reject before its first step.
    """
    return _describe_reward(*plan_reward_run(target, overrides))


def _report_so_far(run: Path) -> None:
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
    with trusting(trust):
        return compare(
            _listed(targets), _listed(overrides), Path(output), None if prompts is None else _listed(prompts),
            images_per_prompt, list(seeds) if seeds is not None else None, _listed(rewards), _listed(metrics),
            features, Knobs(lora_scale, anneal), None if latents is None else Path(latents),
        )  # fmt: skip


def score(
    targets: str | Path | Sequence[str | Path] = (),
    rewards: str | Sequence[str] = (),
    overrides: str | Sequence[str] = (),
    prompts: str | Path | None = None,
    prompt: str | None = None,
    skip: int = 10,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Scores pictures on disk: files, directories with all below them, and .tar files.

    rewards: by name. overrides: `key=value` strings, such as reward.clip_score.path=my_clip, device=cpu and
    train.sampling_batch_size=4. prompts: a file of a prompt for each picture, in their order, or by name where it has a
    field file, file_name, image, name or key; else `prompt` is that of all; else the .txt beside each picture is its
    own. skip: how many pictures that cannot be read are left out before that is an error.

    Returns {"rewards": {name: settings, mean, standard_deviation, lowest, highest, and the files whose score is
    "not_finite"}, "pictures": [{file, prompt, reward/<name>}], "skipped": [{file, reason}], "left_out": [file]}. It is
    written to `output` too, where that is a .json file; "pictures" alone where it is a .jsonl file.

    Raises UserError for a user's mistake.
    """
    wanted = [targets] if isinstance(targets, (str, Path)) else list(targets)
    file = None if output is None else Path(output)
    return _score(wanted, _listed(rewards), _listed(overrides), prompts, prompt, skip, file)


def score_pairs(
    pairs: str | Path,
    rewards: str | Sequence[str] = (),
    overrides: str | Sequence[str] = (),
    skip: int = 10,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Says which of two pictures each reward prefers, and how often the label agrees, where there is one.

    pairs: files that `data.pairs.read_pairs` reads. skip: how many pairs with a picture that cannot be read are left
    out before that is an error. rewards, overrides, output: as for `score`.

    Returns {"rewards": {name: settings, first_wins, second_wins, ties, accuracy over the `labelled` pairs that are no
    ties, its standard_error, and the pairs with a score that is "not_finite"}, "pairs": [{pair, caption, label,
    reward/<name>: both scores}], "skipped": [{file, reason}]}. label: how much the first is preferred, null where that
    is not known.

    Raises UserError for a user's mistake.
    """
    return _score_pairs(pairs, _listed(rewards), _listed(overrides), skip, None if output is None else Path(output))


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def convert_reward(file: str | Path, output: str | Path, processor: str | None = None) -> Path:
    """Writes a reward of NeMo-Aligner, a CLIP in a .nemo file, as a `CLIPModel` directory with all that scoring needs,
    and returns it: `load_reward("pickscore", path=...)` loads it.

    processor: directory or hub id of the tokenizer; None: the one that the file names, else CLIP ViT-H/14's.

    Raises UserError for a user's mistake.
    """
    quiet_libraries()
    return convert_nemo(file, output, processor)


def export(target: str, format: str = "diffusers", output: str | Path | None = None) -> Path:
    """Writes a run's trained weights for other programs, with a model card and pictures. Returns their directory.

    target: RUN, RUN@step or RUN@best. format: "diffusers": as the run has them. "kohya": a LoRA file for ComfyUI,
    AUTOMATIC1111, Forge, InvokeAI and sd-scripts. "merged": a whole pipeline, the adapter added to the weights in
    float32 and these in the precision of the base model's. output: a directory; None: below the run's export/. What an
    earlier export left there is replaced as a whole.

    Raises UserError for a user's mistake, such as an output with something else in it.
    """
    return export_run(target, format, None if output is None else Path(output))


def sweep(
    recipe: str | Path = "emoji",
    grid: Mapping[str, Any] | None = None,
    name: str | None = None,
    directory: str | Path = "sweeps",
    jobs: int | None = None,
    trust: bool = False,
) -> Path:
    """Trains a grid of runs, each in a process of its own, and writes the report. Returns the sweep's directory.

    recipe: a recipe's name or file, or a sweep file. grid: each key's values, such as {"objective.kl_coeff": [0, 1],
    "seed": range(3)}; a value that is itself a list stands in a list of its own. What became of each run is in
    manifest.json; the same call again goes on where it was stopped. jobs: how many runs train at the same time; one on
    each GPU, or one, unless given. trust: as for `train`.

    Raises UserError for a user's mistake, before any run starts, and Interrupted where the process is asked to stop.
    """
    with trusting(trust):
        planned = plan_sweep(recipe, written_grid(grid or {}, "grid"), name, Path(directory))
    run_planned(planned, jobs)
    return planned.directory


def run_planned(planned: Plan, jobs: int | None = None) -> Path | None:
    """Trains the runs of a plan that are not finished, `jobs` at a time.

    Returns the report's path; None where no run left anything.
    """
    manifest = run_sweep(planned, jobs)
    try:
        return write_report(planned.directory)
    except UserError:
        if all(entry.status == "failed" for entry in manifest.runs):  # and left nothing; why is told run by run
            return None
        raise


def pack_prompts(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    column: str | None = None,
    rules: PackRules | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes prompts of files, built-in sets and data sets of the hub as shards for `data.prompts`.

    output: a directory, or a range of names in one, such as `prompts/{00000..00015}.tar`. column: of what has columns.
    rules: what is dropped and held out. overwrite: whether packed prompts that are there are replaced.

    Returns the summary, which is in `output`/pack.json too. Raises UserError for a user's mistake.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else sources
    return _pack_prompts(listed, output, column, rules, overwrite)


def show_prompts(source: str | Path, column: str | None = None, examples: int = 5) -> dict[str, Any]:
    """What is in a source of prompts: counts, lengths, duplicates, held-out part, examples.

    Raises UserError for a user's mistake.
    """
    return describe_prompts(source, column, examples)
