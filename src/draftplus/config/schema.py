"""Every key of a run, with its default and one line of help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _key(default: Any, help: str) -> Any:
    if callable(default):
        return field(default_factory=default, metadata={"help": help})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class LoraConfig:
    rank: int = _key(8, "rank of the adapters")
    alpha: float = _key(8.0, "the adapters' effect is scaled by alpha / rank")
    targets: Any = _key(
        "attention", "attention | linear | convolution | all, or a list of module names of the denoiser"
    )


@dataclass
class ModelConfig:
    path: str = _key("emoji", "built-in name, diffusers directory, hub id, or single .safetensors/.ckpt file")
    revision: str | None = _key(None, "revision on the hub")
    unet: str | None = _key(None, "replacement weights of the denoiser, diffusers or original LDM layout")
    vae: str | None = _key(None, "replacement weights of the autoencoder, diffusers or original LDM layout")
    dtype: str = _key("float32", "of frozen weights: float32 | bfloat16 | float16; trained weights are float32")
    lora: LoraConfig | None = _key(LoraConfig, "null: full fine-tuning of the denoiser")
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass: less memory, more time")


@dataclass
class SamplerConfig:
    solver: str = _key("auto", "auto | ddim | euler | dpmpp_2m; auto: ddim, or euler for flow matching")
    steps: int = _key(10, "denoising steps")
    guidance_scale: float = _key(4.0, "classifier-free guidance; at most 1: none")
    eta: float = _key(0.0, "noise of DDIM, 0 (deterministic) to 1")
    spacing: str | None = _key(None, "leading | trailing | linspace; null: the model's own")
    height: int | None = _key(None, "pixels; null: the model's own")
    width: int | None = _key(None, "pixels; null: the model's own")
    negative_prompt: str = _key("", "the prompt that guidance moves away from")


@dataclass
class DraftLvConfig:
    samples: int = _key(2, "re-noised copies of x_0 per image")


@dataclass
class ReflConfig:
    first: float = _key(0.75, "the trained step is drawn from this fraction of the trajectory onwards")
    hinge: float | None = _key(None, "loss ReLU(hinge - reward) instead of -reward")


@dataclass
class AlignpropConfig:
    min_steps: int = _key(1, "fewest steps with gradient, K is uniform in [min_steps, max_steps]")
    max_steps: int | None = _key(None, "most steps with gradient; null: all")


@dataclass
class DrtuneConfig:
    early_stop: int = _key(0, "up to this many of the last steps are left out, a random number each time")


@dataclass
class DdpoConfig:
    eta: float = _key(1.0, "noise of DDIM in its rollouts, above 0 to 1; sampler.eta is that of pictures")
    inner_epochs: int = _key(1, "passes over each batch of rollouts")
    updates: int = _key(1, "optimizer updates in each pass, each on its part of the batch")
    clip: float = _key(1e-4, "the ratio of probabilities is clipped to 1 - clip, 1 + clip")
    adv_clip: float = _key(5.0, "advantages are clipped to -adv_clip, adv_clip")
    history: int | None = _key(16, "latest rewards of a prompt that normalise its advantages; null: only the batch's")
    min_history: int = _key(16, "the batch's rewards serve as long as a prompt has fewer than this")


@dataclass
class ObjectiveConfig:
    method: str = _key("draft", "draft | draft_lv | refl | alignprop | drtune | ddpo")
    grad_steps: Any = _key(1, 'K, the steps that carry gradient, or "all"')
    kl_coeff: float = _key(0.0, "weight of the KL term; above 0 makes it DRaFT+")
    kl_space: str = _key("noise", "noise | x0: distance of the predicted noises or clean latents")
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
    images_per_prompt: int = _key(1, "images of each prompt in a step, next to one another")


@dataclass
class OptimConfig:
    lr: float = _key(1e-3, "learning rate of AdamW")
    weight_decay: float = _key(0.0, "weight decay of AdamW")
    betas: list[float] = _key([0.9, 0.999], "betas of AdamW")
    warmup_steps: int = _key(0, "steps over which the learning rate rises from 0")
    grad_clip: float | None = _key(10.0, "largest gradient norm; null: no clipping")
    ema: float | None = _key(None, "decay of the averaged weights, which then are evaluated and exported; null: none")


@dataclass
class TrainConfig:
    steps: int | None = _key(80, "steps, each on one batch of images; null: as epochs says")
    epochs: int | None = _key(None, "passes over the prompts, instead of steps")
    global_batch_size: int = _key(8, "images per step, over all ranks")
    micro_batch_size: int = _key(8, "images per backward pass on one rank")
    sampling_batch_size: int | None = _key(
        None, "images per gradient-free pass on one rank; null: 16, or micro_batch_size in ddpo's rollouts"
    )


@dataclass
class EvalConfig:
    every: int = _key(40, "steps between evaluations")
    prompts: str | None = _key(None, "null: the prompt set's own held-out part; or a set or file of prompts")
    max_prompts: int | None = _key(4, "at most this many of them, evenly spaced; null: all")
    images_per_prompt: int = _key(12, "images of each prompt")
    rewards: dict[str, RewardConfig] = _key({}, "held-out rewards, measured and not optimised")
    variants: list[dict[str, Any]] = _key(
        [], "more ways to sample: {lora_scale: 0.5}, {anneal: 'power:2'}, {checkpoint: 40}"
    )


@dataclass
class CheckpointConfig:
    every: int = _key(20, "steps between checkpoints")
    keep: int = _key(2, "full training states that are kept; every evaluation's adapter stays")


@dataclass
class StopConfig:
    diversity_floor: float | None = _key(None, "end when LPIPS falls below this fraction of the base model's")
    held_out_drop: float | None = _key(None, "end when a held-out reward falls this far below its best")


@dataclass
class ParallelConfig:
    mode: str = _key("auto", "auto | replicate | shard")


@dataclass
class LogConfig:
    to: list[str] = _key(["tensorboard"], "any of tensorboard, wandb, trackio")


@dataclass
class Config:
    """A run. The comments in `draftplus train --help` come from here."""

    name: str | None = _key(None, "run directory; null: <recipe>-<hash of the keys that shape the trajectory>")
    output_dir: str = _key("runs", "where run directories are made")
    seed: int = _key(0, "of all randomness")
    device: str = _key("auto", "auto | cpu | cuda | cuda:1 | mps")
    model: ModelConfig = _key(ModelConfig, "")
    sampler: SamplerConfig = _key(SamplerConfig, "")
    objective: ObjectiveConfig = _key(ObjectiveConfig, "")
    reward: dict[str, RewardConfig] = _key(
        lambda: {"emoji_clip": RewardConfig()}, "rewards by name, or package.module:object"
    )
    data: DataConfig = _key(DataConfig, "")
    optim: OptimConfig = _key(OptimConfig, "")
    train: TrainConfig = _key(TrainConfig, "")
    eval: EvalConfig = _key(EvalConfig, "")
    checkpoint: CheckpointConfig = _key(CheckpointConfig, "")
    stop: StopConfig = _key(StopConfig, "")
    parallel: ParallelConfig = _key(ParallelConfig, "")
    log: LogConfig = _key(LogConfig, "")
