"""Values that are out of range or do not fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from draftplus.config.keys import flatten, nearest, to_dict
from draftplus.config.schema import Config
from draftplus.errors import UserError

LOGGERS = ("tensorboard", "wandb", "trackio")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "objective.method": ("draft", "draft_lv", "refl", "alignprop", "drtune", "ddpo"),
    "objective.kl_space": ("noise", "x0"),
    "parallel.mode": ("auto", "replicate", "shard"),
}

CUSTOM_REWARD = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def check(config: Config) -> None:
    """Refuses values that are out of range or do not fit together.

    Raises UserError naming the key, its value and what would do.
    """
    flat = flatten(to_dict(config))
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            near = nearest(str(flat[key]), allowed)
            raise UserError(f"{key} is '{flat[key]}'; {near + ' ' if near else ''}Choose one of: {', '.join(allowed)}")
    positive = ("sampler.steps", "train.steps", "train.epochs", "train.global_batch_size", "train.micro_batch_size",
                "train.sampling_batch_size", "data.images_per_prompt", "eval.every", "eval.images_per_prompt",
                "eval.max_prompts", "checkpoint.every", "checkpoint.keep", "objective.draft_lv.samples",
                "objective.alignprop.min_steps", "objective.alignprop.max_steps", "model.lora.rank", "model.lora.alpha",
                "sampler.height", "sampler.width", "optim.lr", "optim.grad_clip", "objective.ddpo.inner_epochs",
                "objective.ddpo.updates", "objective.ddpo.clip", "objective.ddpo.adv_clip",
                "stop.held_out_drop")  # fmt: skip
    for key in positive:
        value = flat.get(key)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key} is {value}; it must be finite and above 0")
    for key in ("objective.kl_coeff", "optim.weight_decay", "optim.warmup_steps", "objective.drtune.early_stop"):
        if not 0 <= flat[key] < math.inf:
            raise UserError(f"{key} is {flat[key]}; it must be finite and not negative")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas is {config.optim.betas}; give two numbers in [0, 1), such as [0.9, 0.999]")
    if config.optim.ema is not None and not 0 < config.optim.ema < 1:
        raise UserError(f"optim.ema is {config.optim.ema}; a decay lies between 0 and 1, such as 0.999")
    if config.train.steps is None and config.train.epochs is None:
        raise UserError("train.steps and train.epochs are both null; set one of them")
    if not config.reward:
        raise UserError("reward is empty; name one, such as reward=emoji_clip")
    for name in [*config.reward, *config.eval.rewards]:
        if ":" in name and not CUSTOM_REWARD.fullmatch(name):
            raise UserError(
                f"reward '{name}' is neither a built-in name nor package.module:object; settings of a reward are a "
                "mapping, such as reward.emoji_clip.weight=2"
            )
    for name, one in config.eval.rewards.items():
        if name in config.reward:
            raise UserError(
                f"eval.rewards.{name} is also trained on, and so is measured already; name another reward there"
            )
        if one.weight != 1:
            raise UserError(
                f"eval.rewards.{name}.weight is {one.weight}; held-out rewards are not summed, leave it at 1"
            )
        if one.args.get("dropout"):
            raise UserError(
                f"eval.rewards.{name}.args.dropout is {one.args['dropout']}; it acts on gradients, which a held-out "
                "reward does not give: remove it"
            )
    for name, one in config.reward.items():
        if not math.isfinite(one.weight):
            raise UserError(f"reward.{name}.weight is {one.weight}; it must be finite")
    for key in ("sampler.guidance_scale", "objective.refl.hinge"):
        if flat[key] is not None and not math.isfinite(flat[key]):
            raise UserError(f"{key} is {flat[key]}; it must be finite")
    for name in config.log.to:
        if name not in LOGGERS:
            raise UserError(f"log.to: unknown logger '{name}'; choose {', '.join(LOGGERS)}")
    floor, drop = config.stop.diversity_floor, config.stop.held_out_drop
    if floor is not None and not 0 < floor < 1:
        raise UserError(f"stop.diversity_floor is {floor}; it is a fraction of the base model's LPIPS, between 0 and 1")
    if drop is not None and not config.eval.rewards:
        raise UserError("stop.held_out_drop needs a reward that is not optimised; name one in eval.rewards")
    _check_windows(config)
    _check_ddpo(config)
    _check_variants(config)


def _check_variants(config: Config) -> None:
    known = ("lora_scale", "anneal", "checkpoint")
    for number, variant in enumerate(config.eval.variants):
        where, example = f"eval.variants[{number}]", "such as {lora_scale: 0.5}"
        if not variant:
            raise UserError(f"{where} is empty; give one of {', '.join(known)}, {example}")
        for key, value in variant.items():
            if key not in known:
                raise UserError(f"{where}: unknown key '{key}'; {nearest(key, known) or ', '.join(known)}")
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key == "lora_scale" and not (numeric and math.isfinite(value)):
                raise UserError(f"{where}.lora_scale is {value!r}; give a number, {example}")
            if key == "anneal" and not isinstance(value, str):
                raise UserError(f"{where}.anneal is {value!r}; give a schedule, such as {{anneal: 'power:2'}}")
        if "lora_scale" in variant and config.model.lora is None:
            raise UserError(f"{where}.lora_scale: model.lora is null, and only LoRA has a scale; use anneal")
        if variant in config.eval.variants[:number]:
            raise UserError(f"{where} is {variant}, as one before it; name each variant once")
        if "checkpoint" in variant:
            _check_checkpoint(config, variant, where)


def _check_checkpoint(config: Config, variant: Mapping[str, object], where: str) -> None:
    step, every, last = variant["checkpoint"], config.eval.every, config.train.steps
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{where}.checkpoint is {step!r}; give a step, such as {{checkpoint: {every}}}")
    if len(variant) > 1:
        raise UserError(
            f"{where}: a checkpoint stands alone, since it is not sampled again; "
            f"for both say: draftplus evaluate RUN@{step} --lora-scale S"
        )
    if config.train.epochs is None and last is not None and step > last:
        raise UserError(f"{where}.checkpoint is {step}, but the run ends at train.steps={last}")
    if step % every and step != last:
        raise UserError(f"{where}.checkpoint is {step}; it must be evaluated, so a multiple of eval.every={every}")


def _check_windows(config: Config) -> None:
    k, steps = config.objective.grad_steps, config.sampler.steps
    if k != "all" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        raise UserError(f"objective.grad_steps is {k!r}; give a number from 1 to {steps}, or all")
    if k != "all" and k > steps:
        raise UserError(
            f"objective.grad_steps is {k} but sampler.steps is {steps}; "
            f"set objective.grad_steps to at most {steps}, or all"
        )
    if config.objective.method in ("draft_lv", "refl") and k != 1:
        raise UserError(
            f"objective.grad_steps is {k} but method {config.objective.method} has one step with gradient; "
            f"set objective.grad_steps=1"
        )
    if config.objective.method == "alignprop" and k != 1:
        raise UserError(
            f"objective.grad_steps is {k} but method alignprop draws the number of steps with gradient; "
            f"set objective.grad_steps=1, and objective.alignprop.min_steps and max_steps"
        )
    low, high = config.objective.alignprop.min_steps, config.objective.alignprop.max_steps
    if config.objective.method == "alignprop" and not low <= (high or steps) <= steps:
        raise UserError(
            f"objective.alignprop: min_steps {low}, max_steps {high}, sampler.steps {steps} "
            f"must not decrease in this order"
        )
    if config.objective.method == "drtune" and config.objective.drtune.early_stop >= steps:
        raise UserError(
            f"objective.drtune.early_stop is {config.objective.drtune.early_stop}; "
            f"it must be below sampler.steps, {steps}"
        )
    if not 0 <= config.objective.refl.first < 1:
        raise UserError(f"objective.refl.first is {config.objective.refl.first}; it is a fraction in [0, 1)")


def _check_ddpo(config: Config) -> None:
    settings = config.objective.ddpo
    if config.objective.method != "ddpo":
        return
    if settings.min_history < 2:
        raise UserError(f"objective.ddpo.min_history is {settings.min_history}; a deviation needs at least 2 rewards")
    if settings.history is not None and settings.history < settings.min_history:
        better = f"min_history={settings.history}" if settings.history > 1 else f"history={settings.min_history}"
        raise UserError(
            f"objective.ddpo.history is {settings.history} but min_history is {settings.min_history}, which it would "
            f"never reach; set objective.ddpo.{better}, or history=null"
        )
    if not 0 < settings.eta <= 1:
        raise UserError(
            f"objective.ddpo.eta is {settings.eta}; it lies above 0, where sampling is deterministic and has no "
            "probabilities to learn from, and at most at 1"
        )
    if config.objective.grad_steps not in (1, "all"):
        raise UserError(
            f"objective.grad_steps is {config.objective.grad_steps} but method ddpo learns from all steps; "
            f"set objective.grad_steps=all"
        )
    if config.train.global_batch_size == 1:
        raise UserError(
            "train.global_batch_size is 1 but method ddpo compares the rewards of a batch; give at least 2, such as 64"
        )
