"""Every key of `draftplus reward train`, with its default and one line of help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftplus.config.facts import key as _key
from draftplus.config.schema import CheckpointConfig, Config, LogConfig, OptimConfig, ParallelConfig

REWARD = "reward"  # what `task` says in the file of such a run


@dataclass
class TrainedClipConfig:
    path: str = _key(
        "emoji_clip", "CLIPModel to start from: emoji_clip, a directory in transformers' format, or a hub id", file=True
    )
    processor: str | None = _key(
        None, "directory or hub id with tokenizer and preprocessing; null: those of path", file=True
    )
    revision: str | None = _key(None, "revision of a hub model")
    towers: str = _key("both", "which of the two towers learn", choices=("both", "image", "text"))
    logit_scale: bool = _key(True, "whether the factor on the cosine, exp(logit_scale), learns too")
    dtype: str = _key(
        "float32", "precision in which both towers compute; weights, their updates and the loss are always float32",
        choices=("float32", "bfloat16"), added=True,
    )  # fmt: skip
    gradient_checkpointing: bool = _key(
        False, "recompute activations in the backward pass, which saves memory and takes more time", affects="conduct"
    )


@dataclass
class PairsConfig:
    pairs: str | None = _key(
        None, "pairs to train on: a .parquet, .jsonl or .tar file, a directory of these, or a pattern", file=True
    )
    validation: str | None = _key(
        None, "pairs to validate on; null: those of the captions that held_out takes from pairs", file=True
    )
    held_out: float = _key(
        0.1, "which fraction of the captions, or of the pairs, is held out for validation", above=0, below=1
    )
    split_by: str = _key(
        "caption", "what is never on both sides; with pair, a caption may be", choices=("caption", "pair")
    )
    balance: str = _key(
        "none", "what has the same weight in the loss: every pair, every caption, or ties and decided pairs each",
        choices=("none", "caption", "outcome"),
    )  # fmt: skip
    max_broken: int = _key(
        100, "how many pairs may be left out because a picture cannot be read", at_least=0, affects="conduct"
    )
    cache_gb: float = _key(1.0, "memory for pictures that were read, in GB", at_least=0, affects="conduct")


@dataclass
class RewardOptimConfig(OptimConfig):
    lr: float = _key(1e-5, "learning rate; of adafactor at most 1, relative to a matrix's own size", above=0)
    grad_clip: float | None = _key(1.0, "gradients are clipped to this norm; null: no clipping", above=0)


@dataclass
class RewardStepsConfig:
    steps: int | None = _key(400, "number of training steps; null: epochs decides", above=0, affects="length")
    epochs: int | None = _key(None, "passes over the pairs; if set, it overrides steps", above=0, affects="length")
    global_batch_size: int = _key(32, "pairs per step, summed over all ranks", above=0)
    micro_batch_size: int = _key(32, "pairs per backward pass on one rank", above=0, affects="conduct")


@dataclass
class RewardEvalConfig:
    every: int = _key(50, "steps between validations", above=0)
    max_pairs: int | None = _key(2000, "validate on at most this many pairs, evenly spaced; null: all", above=0)
    worst: int = _key(12, "how many of the pairs that it gets most wrong are kept as pictures", at_least=0)


@dataclass
class RewardCheckpointConfig(CheckpointConfig):
    keep: int = _key(2, "number of checkpoints to keep; the weights of the best validation are always kept", above=0)


@dataclass
class RewardStopConfig:
    patience: int | None = _key(
        5, "end the run after this many validations in a row without a better one; null: never", above=0
    )
    by: str = _key("loss", "what a better validation is, here and in best.json", choices=("loss", "accuracy"))


@dataclass
class RewardTrainConfig:
    """All settings of a training of a reward. `draftplus reward train --help` shows their help texts."""

    task: str = _key(REWARD, "tells these settings from those of a fine-tuning run", choices=(REWARD,))
    name: str | None = _key(
        None, "name of the run directory; null: <recipe>-<hash of the keys that affect training>", affects="conduct"
    )
    output_dir: str = _key("runs", "directory in which run directories are created", affects="conduct")
    seed: int = _key(0, "random seed, of the order of the pairs")
    device: str = _key("auto", "device to run on: auto | cpu | cuda | cuda:1 | mps", affects="conduct")
    model: TrainedClipConfig = _key(TrainedClipConfig)
    data: PairsConfig = _key(PairsConfig)
    optim: RewardOptimConfig = _key(RewardOptimConfig)
    train: RewardStepsConfig = _key(RewardStepsConfig)
    eval: RewardEvalConfig = _key(RewardEvalConfig, affects="record")
    checkpoint: RewardCheckpointConfig = _key(RewardCheckpointConfig, affects="record")
    stop: RewardStopConfig = _key(RewardStopConfig, affects="conduct")
    parallel: ParallelConfig = _key(ParallelConfig, affects="conduct")
    log: LogConfig = _key(LogConfig, affects="record")


AnyConfig = Config | RewardTrainConfig
COMMANDS: dict[Any, str] = {Config: "draftplus train", RewardTrainConfig: "draftplus reward train"}
