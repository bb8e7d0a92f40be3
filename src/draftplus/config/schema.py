"""Every key of a run, with its default and one line of help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftplus.config.facts import key as _key
from draftplus.config.objective import ObjectiveConfig

KNOBS = ("lora_scale", "anneal", "checkpoint")  # the keys that an entry of eval.variants may have


@dataclass
class LoraConfig:
    rank: int = _key(8, "rank of the adapters", above=0)
    alpha: float = _key(8.0, "the effect of the adapters is scaled by alpha / rank", above=0)
    targets: Any = _key(
        "attention", "or a list of module names of the denoiser", choices=("attention", "linear", "convolution", "all")
    )


@dataclass
class ModelConfig:
    path: str = _key(
        "emoji", "built-in name, diffusers directory, hub id, or single .safetensors/.ckpt file", base_model=True,
        file=True,
    )  # fmt: skip
    revision: str | None = _key(None, "revision of a hub model", base_model=True)
    denoiser: str | None = _key(
        None, "replacement weights for the denoiser, in diffusers or original layout", base_model=True, file=True
    )
    vae: str | None = _key(
        None, "replacement weights for the autoencoder, in diffusers or original layout", base_model=True,
        file=True,
    )  # fmt: skip
    dtype: str = _key(
        "float32", "precision of frozen weights; trained weights are always float32",
        choices=("float32", "bfloat16", "float16"), base_model=True,
    )  # fmt: skip
    variant: str | None = _key(
        None, "files of which variant are loaded, such as fp16; null: those without one, or the only variant",
        base_model=True, added=True,
    )  # fmt: skip
    config: str | None = _key(
        None, "configurations of a single file: diffusers directory, sd1, sd2, sd2-base or sdxl; null: by its weights",
        base_model=True, file=True, added=True,
    )  # fmt: skip
    quantize: str | None = _key(
        None, "smaller frozen weights of denoiser and text encoders, under LoRA; null: as model.dtype says",
        choices=("int8", "fp8", "nf4"), base_model=True, added=True,
    )  # fmt: skip
    lora: LoraConfig | None = _key(LoraConfig, "null: full fine-tuning of the denoiser")
    gradient_checkpointing: bool = _key(
        False, "recompute activations in the backward pass, which saves memory and takes more time", affects="conduct"
    )
    vae_slicing: bool = _key(
        False, "decode one image at a time, as vae.enable_slicing() of diffusers", affects="conduct", added=True
    )
    vae_tiling: bool = _key(
        False, "decode large images in tiles that are blended, as vae.enable_tiling() of diffusers", base_model=True,
        added=True,
    )  # fmt: skip
    offload: bool = _key(
        False, "keep autoencoder, rewards and text encoders off the device while they are not needed",
        affects="conduct", added=True,
    )  # fmt: skip


@dataclass
class SamplerConfig:
    solver: str = _key(
        "auto", "auto: that of the model's own scheduler, where it is one of these; else ddim",
        choices=("auto", "ddim", "euler", "dpmpp_2m"),
    )  # fmt: skip
    steps: int | None = _key(None, "number of denoising steps; null: the model's default", above=0, of_model=True)
    guidance_scale: float | None = _key(
        None, "guidance scale, which means what it does in the model's stock pipeline; null: its default", of_model=True
    )
    eta: float = _key(0.0, "DDIM noise, from 0 (deterministic) to 1", at_least=0, at_most=1)
    spacing: str | None = _key(
        None, "timestep spacing, of flow-matching models linear alone; null: the model's own",
        choices=("leading", "trailing", "linspace", "linear"),
    )  # fmt: skip
    sigmas: list[float] | None = _key(
        None, "noise level of each step before the shift, for flow-matching models; null: by spacing",
        above=0, at_most=1, each=True, hint="such as [1.0, 0.75, 0.5, 0.25]", added=True,
    )  # fmt: skip
    height: int | None = _key(None, "image height in pixels; null: the model's own", above=0)
    width: int | None = _key(None, "image width in pixels; null: the model's own", above=0)
    negative_prompt: str | None = _key(
        None, "prompt that guidance moves away from; null: the model's default", of_model=True
    )


@dataclass
class RewardConfig:
    weight: float = _key(1.0, "weight in the sum that is optimised")
    path: str | None = _key(None, "weights: a directory or hub id; null: the reward's default", file=True)
    args: dict[str, Any] = _key({}, "further arguments for the reward")
    normalise: str | None = _key(
        None, "in the sum, scaled to mean 0 and deviation 1 over the base model's pictures of training prompts; "
        "null: as it is", choices=("base",), added=True,
    )  # fmt: skip


@dataclass
class DataConfig:
    prompts: str = _key(
        "animals",
        "training prompts: a built-in set, a .txt, .jsonl, .json, .csv, .tsv, .parquet or .tar file, shards, or packed",
        file=True,
    )
    column: str | None = _key(
        None, "column or field that holds the prompt; null: the one named prompt, text or caption", added=True
    )
    images_per_prompt: int = _key(1, "images of each prompt in a step; they are adjacent in the batch", above=0)


@dataclass
class OptimConfig:
    name: str = _key(
        "adamw", "adamw_8bit: moments in 8 bits, by bitsandbytes; adafactor: no first moment, and the second of "
        "rows and columns", choices=("adamw", "adamw_8bit", "adafactor"), added=True,
    )  # fmt: skip
    lr: float = _key(1e-3, "learning rate; of adafactor at most 1, relative to a matrix's own size", above=0)
    weight_decay: float = _key(0.0, "weight decay, apart from the gradient", at_least=0)
    betas: list[float] = _key(
        [0.9, 0.999], "betas of AdamW", at_least=0, below=1, each=True, count=2, hint="such as [0.9, 0.999]"
    )
    warmup_steps: int = _key(0, "steps over which the learning rate rises linearly to optim.lr", at_least=0)
    decay_steps: int | None = _key(
        None, "steps after the warm-up over which the learning rate falls linearly to 0; null: it stays", above=0,
        added=True,
    )  # fmt: skip
    grad_clip: float | None = _key(10.0, "gradients are clipped to this norm; null: no clipping", above=0)
    ema: float | None = _key(
        None, "decay of the moving average of the weights, which is then evaluated and exported; null: no average",
        above=0, below=1, hint="such as 0.999",
    )  # fmt: skip


@dataclass
class PrefixCacheConfig:
    uses: int = _key(
        1, "how often each start noise, with its prompt, is used; what the frozen model draws before objective.gate is "
        "then drawn once", above=0, added=True,
    )  # fmt: skip
    batches: int = _key(
        8, "how many batches of start noises take turns; as many are kept in memory", above=0, added=True
    )


@dataclass
class TrainConfig:
    steps: int | None = _key(
        80, "number of training steps, each on one batch of images; null: epochs decides", above=0, affects="length"
    )
    epochs: int | None = _key(None, "passes over the prompts; if set, it overrides steps", above=0, affects="length")
    global_batch_size: int = _key(8, "images per step, summed over all ranks", above=0)
    micro_batch_size: int = _key(8, "images per backward pass on one rank", above=0, affects="conduct")
    sampling_batch_size: int | None = _key(
        None, "images per pass without gradient on one rank; null: 16, or micro_batch_size in DDPO's rollouts", above=0,
        affects="conduct",
    )  # fmt: skip
    compile: bool = _key(
        False, "compile the denoiser's blocks by torch.compile before the first step, and compute convolutions with "
        "channels last: faster steps that differ by rounding", affects="conduct", added=True,
    )  # fmt: skip
    prefix_cache: PrefixCacheConfig = _key(PrefixCacheConfig, "reuse of what the frozen model draws before the gate")


@dataclass
class EvalConfig:
    every: int = _key(40, "steps between evaluations", above=0)
    prompts: str | None = _key(
        None, "prompts to evaluate on: a built-in set or a file; null: the held-out part of data.prompts", file=True
    )
    max_prompts: int | None = _key(4, "use at most this many of the prompts, evenly spaced; null: all", above=0)
    images_per_prompt: int = _key(12, "images per prompt, at least 2", above=0)
    rewards: dict[str, RewardConfig] = _key({}, "held-out rewards, which are measured but not optimised")
    variants: list[dict[str, Any]] = _key(
        [], "further ways to sample, measured at the end: {lora_scale: 0.5}, {anneal: 'power:2'}, {checkpoint: 40}"
    )


@dataclass
class CheckpointConfig:
    every: int = _key(20, "steps between checkpoints", above=0)
    keep: int = _key(2, "number of checkpoints to keep; the adapter of every evaluation is always kept", above=0)


@dataclass
class StopConfig:
    diversity_floor: float | None = _key(
        None, "end the run when LPIPS falls below this fraction of the base model's; null: never", above=0, below=1,
        hint="as a fraction of the base model's LPIPS",
    )  # fmt: skip
    held_out_drop: float | None = _key(
        None, "end the run when a held-out reward falls this far below its best; null: never", above=0
    )


@dataclass
class ParallelConfig:
    mode: str = _key(
        "auto", "how processes hold the denoiser; replicate (auto): each all of it; shard: each a part of it",
        choices=("auto", "replicate", "shard"),
    )  # fmt: skip
    shard_size: int | None = _key(
        None, "processes that hold a sharded denoiser together; null: those of one machine", above=0
    )
    shard_frozen_above: str | None = _key(
        "1GiB", "with shard, the autoencoder's decoder and the networks of a reward are in parts, too, where they take "
        "more than this; null: never", added=True,
    )  # fmt: skip
    timeout: float = _key(
        30.0, "minutes without progress after which a process that others wait for ends the run with a reason", above=0,
        added=True,
    )  # fmt: skip


@dataclass
class LogConfig:
    to: list[str] = _key(
        ["tensorboard"], "loggers, any number of these", choices=("tensorboard", "wandb", "trackio"), each=True
    )


@dataclass
class Config:
    """All settings of a run. `draftplus train --help` shows their help texts."""

    name: str | None = _key(
        None, "name of the run directory; null: <recipe>-<hash of the keys that affect training>", affects="conduct"
    )
    output_dir: str = _key("runs", "directory in which run directories are created", affects="conduct")
    seed: int = _key(0, "random seed")
    device: str = _key("auto", "device to run on: auto | cpu | cuda | cuda:1 | mps", affects="conduct")
    model: ModelConfig = _key(ModelConfig)
    sampler: SamplerConfig = _key(SamplerConfig)
    objective: ObjectiveConfig = _key(ObjectiveConfig)
    reward: dict[str, RewardConfig] = _key(
        lambda: {"emoji_clip": RewardConfig()}, "rewards to optimise, by built-in name or package.module:object"
    )
    data: DataConfig = _key(DataConfig)
    optim: OptimConfig = _key(OptimConfig)
    train: TrainConfig = _key(TrainConfig)
    eval: EvalConfig = _key(EvalConfig, affects="record")
    checkpoint: CheckpointConfig = _key(CheckpointConfig, affects="record")
    stop: StopConfig = _key(StopConfig, affects="conduct")
    parallel: ParallelConfig = _key(ParallelConfig, affects="conduct")
    log: LogConfig = _key(LogConfig, affects="record")
