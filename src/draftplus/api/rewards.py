"""What `draftplus reward` does, functions do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftplus.api import listed, report_so_far
from draftplus.build import quiet_libraries
from draftplus.config import RewardTrainConfig
from draftplus.evaluation.score import score as _score
from draftplus.evaluation.score_pairs import score_pairs as _score_pairs
from draftplus.launcher import is_main_process
from draftplus.report import write_report
from draftplus.rewards.nemo import convert_nemo
from draftplus.runs.plan import plan_reward_run
from draftplus.training.dry_run import describe_reward as _describe_reward
from draftplus.training.train import train_reward as _train_reward


def train_reward(target: RewardTrainConfig | str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Trains a reward on preference pairs, or continues, and writes the report. Returns the run directory, in which
    reward/ is a `CLIPModel` directory, the best by validation: `reward.clip.path` loads it.

    target: a configuration, a file of pairs, a YAML file, or a run directory. overrides: `key=value` strings.

    Raises UserError for a user's mistake.
    """
    config, run = plan_reward_run(target, overrides)
    _train_reward(config, run, report_so_far)
    if is_main_process():
        write_report(run)
    return run


def describe_reward(target: RewardTrainConfig | str | Path | None = None, overrides: Sequence[str] = ()) -> str:
    """What `train_reward` would do with these arguments. It takes one step, whose result is thrown away.

    Raises UserError for everything that `train_reward` would reject before its first step.
    """
    return _describe_reward(*plan_reward_run(target, overrides))


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
    return _score(wanted, listed(rewards), listed(overrides), prompts, prompt, skip, file)


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
    return _score_pairs(pairs, listed(rewards), listed(overrides), skip, None if output is None else Path(output))


def convert_reward(file: str | Path, output: str | Path, processor: str | None = None) -> Path:
    """Writes a reward of NeMo-Aligner, a CLIP in a .nemo file, as a `CLIPModel` directory with all that scoring needs,
    and returns it: `load_reward("pickscore", path=...)` loads it.

    processor: directory or hub id of the tokenizer; None: the one that the file names, else CLIP ViT-H/14's.

    Raises UserError for a user's mistake.
    """
    quiet_libraries()
    return convert_nemo(file, output, processor)
