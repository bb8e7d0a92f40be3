"""Every key of a run, with its default and one line of help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftplus.config.facts import key as _key

KNOBS = ("lora_scale", "anneal", "checkpoint")  # what an entry of eval.variants may have


@dataclass
class LoraConfig:
    rank: int = _key(8, "rank of the adapters", above=0)
    alpha: float = _key(8.0, "the adapters' effect is scaled by alpha / rank", above=0)
    targets: Any = _key(
        "attention", "or a list of module names of the denoiser", choices=("attention", "linear", "convolution", "all")
    )


@dataclass
class ModelConfig:
    path: str = _key(
        "emoji", "built-in name, diffusers directory, hub id, or single .safetensors/.ckpt file", base_model=True
    )
    revision: str | None = _key(None, "revision on the hub", base_model=True)
    denoiser: str | None = _key(
        None, "replacement weights of the denoiser, diffusers or original LDM layout", base_model=True
    )
    vae: str | None = _key(
        None, "replacement weights of the autoencoder, diffusers or original LDM layout", base_model=True
    )
    dtype: str = _key(
        "float32", "of frozen weights, trained ones are float32", choices=("float32", "bfloat16", "float16"),
        base_model=True,
    )  # fmt: skip
    lora: LoraConfig | None = _key(LoraConfig, "null: full fine-tuning of the denoiser")
    gradient_checkpointing: bool = _key(
        False, "recompute activations in the backward pass: less memory, more time", affects="conduct"
    )


@dataclass
class SamplerConfig:
    solver: str = _key("auto", "auto: ddim, or euler for flow matching", choices=("auto", "ddim", "euler", "dpmpp_2m"))
    steps: int | None = _key(None, "denoising steps; null: what the model's stock pipeline takes", above=0)
    guidance_scale: float | None = _key(None, "null: what the model's stock pipeline takes; at most 1: no guidance")
    eta: float = _key(0.0, "noise of DDIM, 0 (deterministic) to 1", at_least=0, at_most=1)
    spacing: str | None = _key(None, "null: the model's own", choices=("leading", "trailing", "linspace"))
    height: int | None = _key(None, "pixels; null: the model's own", above=0)
    width: int | None = _key(None, "pixels; null: the model's own", above=0)
    negative_prompt: str | None = _key(
        None, "the prompt that guidance moves away from; null: what the model's stock pipeline takes"
    )


@dataclass
class DraftLvConfig:
    samples: int = _key(2, "re-noised copies of x_0 per image", above=0)


@dataclass
class ReflConfig:
    first: float = _key(
        0.75, "the trained step is drawn from this fraction of the trajectory onwards", at_least=0, below=1
    )
    hinge: float | None = _key(None, "loss ReLU(hinge - reward) instead of -reward")


@dataclass
class AlignpropConfig:
    min_steps: int = _key(1, "fewest steps with gradient, K is uniform in [min_steps, max_steps]", above=0)
    max_steps: int | None = _key(None, "most steps with gradient; null: all", above=0)


@dataclass
class DrtuneConfig:
    early_stop: int = _key(0, "up to this many of the last steps are left out, a random number each time", at_least=0)


@dataclass
class DdpoConfig:
    eta: float = _key(
        1.0, "noise of DDIM in its rollouts, above 0 to 1; sampler.eta is that of pictures", above=0, at_most=1,
        hint="since at 0 sampling is deterministic and has no probabilities to learn from",
    )  # fmt: skip
    inner_epochs: int = _key(1, "passes over each batch of rollouts", above=0)
    updates: int = _key(1, "optimizer updates in each pass, each on its part of the batch", above=0)
    clip: float = _key(1e-4, "the ratio of probabilities is clipped to 1 - clip, 1 + clip", above=0)
    adv_clip: float = _key(5.0, "advantages are clipped to -adv_clip, adv_clip", above=0)
    history: int | None = _key(16, "latest rewards of a prompt that normalise its advantages; null: only the batch's")
    min_history: int = _key(
        16, "the batch's rewards serve as long as a prompt has fewer than this", at_least=2,
        hint="since a deviation needs 2 rewards",
    )  # fmt: skip


@dataclass
class ObjectiveConfig:
    method: str = _key("draft", "draft | draft_lv | refl | alignprop | drtune | ddpo", in_method_name=True)
    grad_steps: Any = _key(1, 'K, the steps that carry gradient, or "all"', in_method_name=True)
    kl_coeff: float = _key(0.0, "weight of the KL term; above 0 makes it DRaFT+", at_least=0, in_method_name=True)
    kl_space: str = _key(
        "noise", "distance of the predicted noises or clean latents", choices=("noise", "x0"), in_method_name=True
    )
    draft_lv: DraftLvConfig = _key(DraftLvConfig, "of method draft_lv")
    refl: ReflConfig = _key(ReflConfig, "of method refl")
    alignprop: AlignpropConfig = _key(AlignpropConfig, "of method alignprop")
    drtune: DrtuneConfig = _key(DrtuneConfig, "of method drtune")
    ddpo: DdpoConfig = _key(DdpoConfig, "of method ddpo")


@dataclass
class RewardConfig:
    weight: float = _key(1.0, "factor in the sum that is optimised")
    path: str | None = _key(None, "weights: directory, hub id or file; null: the reward's own")
    args: dict[str, Any] = _key({}, "further arguments of the reward")


@dataclass
class DataConfig:
    prompts: str = _key("animals", "built-in set, or a .txt, .jsonl or WebDataset .tar file")
    images_per_prompt: int = _key(1, "images of each prompt in a step, next to one another", above=0)


@dataclass
class OptimConfig:
    lr: float = _key(1e-3, "learning rate of AdamW", above=0)
    weight_decay: float = _key(0.0, "weight decay of AdamW", at_least=0)
    betas: list[float] = _key(
        [0.9, 0.999], "betas of AdamW", at_least=0, below=1, each=True, count=2, hint="such as [0.9, 0.999]"
    )
    warmup_steps: int = _key(0, "steps over which the learning rate rises from 0", at_least=0)
    grad_clip: float | None = _key(10.0, "largest gradient norm; null: no clipping", above=0)
    ema: float | None = _key(
        None, "decay of the averaged weights, which then are evaluated and exported; null: none", above=0, below=1,
        hint="such as 0.999",
    )  # fmt: skip


@dataclass
class TrainConfig:
    steps: int | None = _key(80, "steps, each on one batch of images; null: as epochs says", above=0, affects="length")
    epochs: int | None = _key(None, "passes over the prompts, instead of steps", above=0, affects="length")
    global_batch_size: int = _key(8, "images per step, over all ranks", above=0)
    micro_batch_size: int = _key(8, "images per backward pass on one rank", above=0, affects="conduct")
    sampling_batch_size: int | None = _key(
        None, "images per gradient-free pass on one rank; null: 16, or micro_batch_size in ddpo's rollouts", above=0,
        affects="conduct",
    )  # fmt: skip


@dataclass
class EvalConfig:
    every: int = _key(40, "steps between evaluations", above=0)
    prompts: str | None = _key(None, "null: the prompt set's own held-out part; or a set or file of prompts")
    max_prompts: int | None = _key(4, "at most this many of them, evenly spaced; null: all", above=0)
    images_per_prompt: int = _key(12, "images of each prompt", above=0)
    rewards: dict[str, RewardConfig] = _key({}, "held-out rewards, measured and not optimised")
    variants: list[dict[str, Any]] = _key(
        [], "more ways to sample: {lora_scale: 0.5}, {anneal: 'power:2'}, {checkpoint: 40}"
    )


@dataclass
class CheckpointConfig:
    every: int = _key(20, "steps between checkpoints", above=0)
    keep: int = _key(2, "full training states that are kept; every evaluation's adapter stays", above=0)


@dataclass
class StopConfig:
    diversity_floor: float | None = _key(
        None, "end when LPIPS falls below this fraction of the base model's", above=0, below=1,
        hint="as a fraction of the base model's LPIPS",
    )  # fmt: skip
    held_out_drop: float | None = _key(None, "end when a held-out reward falls this far below its best", above=0)


@dataclass
class ParallelConfig:
    mode: str = _key("auto", choices=("auto", "replicate", "shard"))


@dataclass
class LogConfig:
    to: list[str] = _key(["tensorboard"], "any of them", choices=("tensorboard", "wandb", "trackio"), each=True)


@dataclass
class Config:
    """A run. The comments in `draftplus train --help` come from here."""

    name: str | None = _key(
        None, "run directory; null: <recipe>-<hash of the keys that shape the trajectory>", affects="conduct"
    )
    output_dir: str = _key("runs", "where run directories are made", affects="conduct")
    seed: int = _key(0, "of all randomness")
    device: str = _key("auto", "auto | cpu | cuda | cuda:1 | mps", affects="conduct")
    model: ModelConfig = _key(ModelConfig)
    sampler: SamplerConfig = _key(SamplerConfig)
    objective: ObjectiveConfig = _key(ObjectiveConfig)
    reward: dict[str, RewardConfig] = _key(
        lambda: {"emoji_clip": RewardConfig()}, "rewards by name, or package.module:object"
    )
    data: DataConfig = _key(DataConfig)
    optim: OptimConfig = _key(OptimConfig)
    train: TrainConfig = _key(TrainConfig)
    eval: EvalConfig = _key(EvalConfig, affects="record")
    checkpoint: CheckpointConfig = _key(CheckpointConfig, affects="record")
    stop: StopConfig = _key(StopConfig, affects="conduct")
    parallel: ParallelConfig = _key(ParallelConfig, affects="conduct")
    log: LogConfig = _key(LogConfig, affects="record")
