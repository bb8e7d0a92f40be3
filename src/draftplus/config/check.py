"""Values that are out of range or do not fit together.

What depends on the method or the model is checked where these are known: `diffusion.methods`, `build`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from draftplus.config.facts import Facts
from draftplus.config.keys import nearest, values
from draftplus.config.rewards import AnyConfig
from draftplus.config.schema import KNOBS, Config, OptimConfig, SamplerConfig
from draftplus.errors import UserError

LONGEST_NAME = 200  # in bytes; file systems end at 255, and suffixes are added
CUSTOM_REWARD = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def check_values(config: AnyConfig) -> None:
    """Refuses values that are out of range, whatever the task.

    Raises UserError that names the key, its value and a remedy.
    """
    for key, facts, value in values(config):
        _check_value(key, facts, value)
        if facts.file and value is not None:
            refuse_nobodys_home(key, value)
    if not config.output_dir.strip():
        raise UserError("output_dir is empty; name a directory, such as output_dir=runs")
    if config.optim.name == "adafactor" and config.optim.betas != OptimConfig().betas:
        raise UserError(
            f"optim.betas is {config.optim.betas}, but optim.name=adafactor has no such averages; leave it at "
            f"{OptimConfig().betas}"
        )
    if config.parallel.mode == "shard" and not isinstance(config, Config):
        raise UserError("parallel.mode=shard is for a diffusion model's denoiser; a reward is trained with replicate")
    if config.train.steps is None and config.train.epochs is None:
        raise UserError("train.steps and train.epochs are both null; set one of them")


def check(config: Config) -> None:
    """Refuses values that are out of range or do not fit together.

    Raises UserError that names the key, its value and a remedy.
    """
    check_values(config)
    _check_sigmas(config.sampler)
    if not config.reward:
        raise UserError("reward is empty; name one, such as reward=emoji_clip")
    for name in [*config.reward, *config.eval.rewards]:
        if ":" in name and not CUSTOM_REWARD.fullmatch(name):
            raise UserError(
                f"reward '{name}' is neither a built-in reward nor of the form package.module:object; set a "
                "reward's options like this: reward.emoji_clip.weight=2"
            )
    for name, one in config.eval.rewards.items():
        if name in config.reward:
            raise UserError(
                f"eval.rewards.{name} is also trained on, so it is measured already; remove it or name another reward"
            )
        if one.weight != 1:
            raise UserError(
                f"eval.rewards.{name}.weight is {one.weight}, but held-out rewards are not summed; leave it at 1"
            )
        if one.normalise is not None:
            raise UserError(
                f"eval.rewards.{name}.normalise is {one.normalise}, but held-out rewards are not summed; remove it"
            )
        if one.args.get("dropout"):
            raise UserError(
                f"eval.rewards.{name}.args.dropout is {one.args['dropout']}, but dropout has no effect on a held-out "
                "reward; remove it"
            )
    if config.stop.held_out_drop is not None and not config.eval.rewards:
        raise UserError("stop.held_out_drop needs a held-out reward; name one in eval.rewards")
    if config.model.quantize is not None and config.model.lora is None:
        raise UserError(
            f"model.quantize is {config.model.quantize}, but model.lora is null: quantised weights are frozen, and "
            "full fine-tuning trains them all; set model.quantize=null, or give model.lora a rank"
        )
    if config.parallel.mode == "shard" and config.model.quantize is not None:
        raise UserError(
            f"model.quantize={config.model.quantize} does not work with parallel.mode=shard, which cannot divide "
            "quantised weights; set model.quantize=null, or parallel.mode=replicate"
        )
    if config.parallel.mode == "shard" and config.model.lora is None and config.optim.name != "adamw":
        raise UserError(
            f"optim.name={config.optim.name} does not work with parallel.mode=shard and full fine-tuning, where the "
            "optimizer's tensors are divided; use optim.name=adamw, adapters (model.lora), or parallel.mode=replicate"
        )
    _check_variants(config)


def refuse_nobodys_home(where: str, path: str) -> None:
    """UserError for a path that begins with ~ and the name of a user that there is not."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        user = path.partition("/")[0]
        raise UserError(f"{where} '{path}': there is no home directory {user}; write the whole path") from None


def refuse_bad_name(key: str, name: str) -> None:
    """UserError for a name of a directory of results that commands could not reach, or that leaves its place."""
    parts, why = name.split("/"), None
    if not name.strip():
        why = "it is empty; leave it out, or give a word"
    elif any(sign in name for sign in "@=\\") or not name.isprintable():
        why = "it must not contain @, =, a backslash or control characters, by which commands could not reach it"
    elif {"", ".", ".."} & {*parts} or name[0] in "~-":
        why = "it must be a name below the directory of its kind, without . or .. or an empty part, or ~ or - in front"
    elif any(part != part.strip() for part in parts):
        why = "it must not begin or end with a space"
    elif max(len(part.encode()) for part in parts) > LONGEST_NAME:
        why = f"it is longer than {LONGEST_NAME} bytes"
    if why is not None:
        shown = name if len(name) <= 80 else f"{name[:80]}…"
        raise UserError(f"{key} {shown!r}: {why}")


def _check_value(key: str, facts: Facts, value: Any) -> None:
    for entry in facts.entries(value):
        if facts.choices and isinstance(entry, str) and entry not in facts.choices:
            near = nearest(entry, facts.choices)
            raise UserError(
                f"{key} {'contains' if facts.each else 'is'} '{entry}'; "
                f"{near + ' Choose' if near else 'choose'} one of: {', '.join(facts.choices)}"
            )
    if not facts.allows(value):
        hint = f", {facts.hint}" if facts.hint else ""
        raise UserError(f"{key} is {value}; it must {facts.demand(value)}{hint}")


def _check_sigmas(sampler: SamplerConfig) -> None:
    sigmas = sampler.sigmas
    if sigmas is None:
        return
    if not sigmas:
        raise UserError("sampler.sigmas is empty; give the noise level of each step, such as [1.0, 0.75, 0.5, 0.25]")
    for before, after in pairwise(sigmas):
        if after >= before:
            raise UserError(f"sampler.sigmas has {after:g} after {before:g}; every level must be below the one before")
    if sampler.steps not in (None, len(sigmas)):
        raise UserError(
            f"sampler.sigmas has {len(sigmas)} levels, one for each step, but sampler.steps is {sampler.steps}; "
            "set sampler.steps=null"
        )
    if sampler.spacing is not None:
        raise UserError(f"sampler.spacing={sampler.spacing} and sampler.sigmas are both set; set one of them to null")


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
            raise UserError(f"{where}.lora_scale needs LoRA, but model.lora is null; use anneal instead")
        if variant in config.eval.variants[:number]:
            raise UserError(f"{where} repeats {variant}; list each variant once")
        if "checkpoint" in variant:
            _check_checkpoint(config, variant, where)


def _check_checkpoint(config: Config, variant: Mapping[str, object], where: str) -> None:
    step, every, last = variant["checkpoint"], config.eval.every, config.train.steps
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{where}.checkpoint is {step!r}; give a step, such as {{checkpoint: {every}}}")
    if len(variant) > 1:
        raise UserError(
            f"{where}: a checkpoint cannot be combined with other settings, because it is not sampled again; "
            f"to combine them, evaluate RUN@{step} after training"
        )
    if config.train.epochs is None and last is not None and step > last:
        raise UserError(f"{where}.checkpoint is {step}, but the run ends at train.steps={last}")
    if step % every and step != last:
        raise UserError(
            f"{where}.checkpoint is {step}; it must be an evaluated step, that is, a multiple of eval.every={every}"
        )
