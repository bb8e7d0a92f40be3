"""Values that are out of range or do not fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from draftplus.config.facts import Facts
from draftplus.config.keys import nearest, values
from draftplus.config.schema import KNOBS, Config
from draftplus.errors import UserError

CUSTOM_REWARD = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def check(config: Config) -> None:
    """Refuses values that are out of range or do not fit together.

    Raises UserError naming the key, its value and what would do.
    """
    for key, facts, value in values(config):
        _check_value(key, facts, value)
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
    if config.stop.held_out_drop is not None and not config.eval.rewards:
        raise UserError("stop.held_out_drop needs a reward that is not optimised; name one in eval.rewards")
    _check_windows(config)
    _check_ddpo(config)
    _check_variants(config)


def _check_value(key: str, facts: Facts, value: Any) -> None:
    for entry in facts.entries(value):
        if facts.choices and isinstance(entry, str) and entry not in facts.choices:
            near = nearest(entry, facts.choices)
            raise UserError(
                f"{key} {'has' if facts.each else 'is'} '{entry}'; {near + ' ' if near else ''}"
                f"Choose one of: {', '.join(facts.choices)}"
            )
    if not facts.allows(value):
        hint = f", {facts.hint}" if facts.hint else ""
        raise UserError(f"{key} is {value}; it must {facts.demand(value)}{hint}")


def _check_variants(config: Config) -> None:
    for number, variant in enumerate(config.eval.variants):
        where, example = f"eval.variants[{number}]", "such as {lora_scale: 0.5}"
        if not variant:
            raise UserError(f"{where} is empty; give one of {', '.join(KNOBS)}, {example}")
        for key, value in variant.items():
            if key not in KNOBS:
                raise UserError(f"{where}: unknown key '{key}'; {nearest(key, KNOBS) or ', '.join(KNOBS)}")
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


def _check_ddpo(config: Config) -> None:
    settings = config.objective.ddpo
    if config.objective.method != "ddpo":
        return
    if settings.history is not None and settings.history < settings.min_history:
        better = f"min_history={settings.history}" if settings.history > 1 else f"history={settings.min_history}"
        raise UserError(
            f"objective.ddpo.history is {settings.history} but min_history is {settings.min_history}, which it would "
            f"never reach; set objective.ddpo.{better}, or history=null"
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
