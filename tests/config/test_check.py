"""Values that are out of range, or do not fit together."""

from __future__ import annotations

import pytest

from draftplus.config import load_config
from draftplus.errors import UserError
from draftplus.runs.plan import settled

POSITIVE = [
    "sampler.steps", "sampler.height", "sampler.width", "train.steps", "train.epochs", "train.global_batch_size",
    "train.micro_batch_size", "train.sampling_batch_size", "data.images_per_prompt", "eval.every",
    "eval.images_per_prompt", "eval.max_prompts", "checkpoint.every", "checkpoint.keep", "objective.draft_lv.samples",
    "objective.alignprop.min_steps", "objective.alignprop.max_steps", "model.lora.rank", "model.lora.alpha",
    "optim.lr", "optim.grad_clip", "objective.ddpo.inner_epochs", "objective.ddpo.updates", "objective.ddpo.clip",
    "objective.ddpo.adv_clip",
]  # fmt: skip
FRACTIONAL = ["optim.lr", "optim.grad_clip", "model.lora.alpha", "objective.ddpo.clip", "objective.ddpo.adv_clip"]
DDPO = ["objective.method=ddpo"]
NOT_NEGATIVE = ["objective.kl_coeff", "optim.weight_decay", "optim.warmup_steps", "objective.drtune.early_stop"]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        settled(load_config(None, overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("key", POSITIVE)
def test_above_zero(key: str) -> None:
    for value in ("0", "-1", *(("nan", "inf", "-0.5") if key in FRACTIONAL else ())):
        message = refused(f"{key}={value}")
        assert message.startswith(f"{key} is ") and "above 0" in message
    others = ["sampler.steps=8", "train.global_batch_size=8"]
    load_config(None, [*(o for o in others if not o.startswith(key)), f"{key}=1"])


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_not_negative(key: str) -> None:
    for value in ("-1", *(("nan", "inf") if key in NOT_NEGATIVE[:2] else ())):
        assert refused(f"{key}={value}").startswith(f"{key} is ")
    load_config(None, [f"{key}=0"])


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("model.dtype=fp16", "float32, bfloat16, float16"),
        ("objective.method=drft", "did you mean 'draft'?"),
        ("objective.method=ppo", "did you mean 'ddpo'?"),
        ("objective.method=x", "draft, draft_lv, refl, alignprop, drtune, ddpo"),
        ("objective.kl_space=pixels", "noise, x0"),
        ("parallel.mode=ddp", "auto, replicate, shard"),
        ("sampler.solver=heun", "auto, ddim, euler, dpmpp_2m"),
        ("sampler.spacing=karras", "leading, trailing, linspace"),
        ("model.lora.targets=lineal", "did you mean 'linear'?"),
    ],
)
def test_choices(override: str, choices: str) -> None:
    message, (key, _, value) = refused(override), override.partition("=")
    assert message.startswith(f"{key} is '{value}'") and choices in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stop.diversity_floor=0"], "stop.diversity_floor is 0.0; it must be above 0 and below 1, as a fraction"),
        (["stop.diversity_floor=1"], "stop.diversity_floor is 1.0; it must be above 0 and below 1, as a fraction"),
        (["stop.held_out_drop=1"], "name one in eval.rewards"),
        (["stop.held_out_drop=0", "eval.rewards={clip_score: {}}"], "it must be finite and above 0"),
        (["objective.grad_steps=0"], "objective.grad_steps is 0; give a number from 1 to 10, or all"),
        (["objective.grad_steps=-2"], "give a number"),
        (["objective.grad_steps=1.5"], "objective.grad_steps is 1.5"),
        (["objective.grad_steps=true"], "objective.grad_steps is True"),
        (["objective.grad_steps=every"], "objective.grad_steps is 'every'"),
        (["objective.grad_steps=null"], "objective.grad_steps is None"),
        (["objective.grad_steps=11"], "set objective.grad_steps to at most 10, or all"),
        (["objective.grad_steps=4", "sampler.steps=3"], "but sampler.steps is 3"),
        (["objective.method=draft_lv", "objective.grad_steps=2"], "set objective.grad_steps=1"),
        (["objective.method=refl", "objective.grad_steps=all"], "set objective.grad_steps=1"),
        (["objective.method=alignprop", "objective.grad_steps=3"], "objective.alignprop.min_steps and max_steps"),
        (
            ["objective.method=alignprop", "objective.alignprop.max_steps=11"],
            "min_steps <= max_steps <= sampler.steps=10",
        ),
        (
            ["objective.method=alignprop", "objective.alignprop.min_steps=11"],
            "min_steps <= max_steps <= sampler.steps=10",
        ),
        (
            ["objective.method=alignprop", "objective.alignprop.min_steps=4", "objective.alignprop.max_steps=3"],
            "min_steps <= max_steps <= sampler.steps=10",
        ),
        (["objective.method=drtune", "objective.drtune.early_stop=10"], "must be below sampler.steps, which is 10"),
        ([*DDPO, "objective.ddpo.eta=0"], "objective.ddpo.eta is 0.0; it must be above 0 and at most 1, because"),
        (['reward="{emoji_clip: {weight: 2}}"'], "is neither a built-in reward nor of the form package.module:object"),
        ([*DDPO, "objective.ddpo.eta=1.5"], "objective.ddpo.eta is 1.5"),
        ([*DDPO, "objective.grad_steps=2"], "learns from all steps; set objective.grad_steps=all"),
        (
            [*DDPO, "objective.ddpo.min_history=1"],
            "objective.ddpo.min_history is 1; it must be at least 2, because a standard deviation",
        ),
        ([*DDPO, "objective.ddpo.history=8"], "set objective.ddpo.min_history=8, or objective.ddpo.history=null"),
        ([*DDPO, "train.global_batch_size=1"], "set it to at least 2, such as 64"),
        (["sampler.sigmas=[]"], "sampler.sigmas is empty; give the noise level of each step"),
        (["sampler.sigmas=[1, 0.5, 0.5]"], "sampler.sigmas has 0.5 after 0.5; every level must be below"),
        (["sampler.sigmas=[0.5, 0.7]"], "sampler.sigmas has 0.7 after 0.5"),
        (["sampler.sigmas=[1, 0]"], "sampler.sigmas is [1.0, 0.0]; it must have entries, each above 0 and at most 1"),
        (["sampler.sigmas=[1.5, 1]"], "each above 0 and at most 1, such as [1.0, 0.75, 0.5, 0.25]"),
        (["sampler.sigmas=[1, x]"], "sampler.sigmas[1]: 'x' is not a number; for example, sampler.sigmas=[0.5]"),
        (["sampler.sigmas=[1, 0.5]", "sampler.steps=3"], "has 2 levels, one for each step, but sampler.steps is 3"),
        (["sampler.sigmas=[1, 0.5]", "sampler.spacing=linear"], "are both set; set one of them to null"),
        (["objective.grad_steps=3", "sampler.sigmas=[1, 0.5]"], "but sampler.steps is 2"),
        (["objective.refl.first=1"], "objective.refl.first is 1.0"),
        (["objective.refl.first=-0.1"], "objective.refl.first is -0.1; it must be at least 0 and below 1"),
        (["optim.ema=1"], "optim.ema is 1.0"),
        (["optim.ema=0"], "such as 0.999"),
        (["optim.betas=[0.9]"], "optim.betas is [0.9]; it must have 2 entries, each at least 0 and below 1"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas is [0.9, 1.0]"),
        (["train.steps=null"], "train.steps and train.epochs are both null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_together(overrides: list[str], says: str) -> None:
    assert says in refused(*overrides)


VARIANTS = {
    "{}": "eval.variants[0] is empty",
    "{scale: 0.5}": "unknown key 'scale'; did you mean 'lora_scale'?",
    "{lora_scale: half}": "eval.variants[0].lora_scale is 'half'; give a number",
    "{lora_scale: .nan}": "lora_scale is nan",
    "{lora_scale: true}": "lora_scale is True",
    "{anneal: 2}": "eval.variants[0].anneal is 2; give a schedule",
    "{checkpoint: first}": "eval.variants[0].checkpoint is 'first'; give a step",
    "{checkpoint: -20}": "give a step",
    "{checkpoint: 30}": "must be an evaluated step, that is, a multiple of eval.every=40",
    "{checkpoint: 120}": "the run ends at train.steps=80",
    "{checkpoint: 40, lora_scale: 0.5}": "evaluate RUN@40 after training",
    "{lora_scale: 0.5}, {anneal: linear}, {lora_scale: 0.5}": "eval.variants[2] repeats {'lora_scale': 0.5}",
}


@pytest.mark.parametrize("given", VARIANTS)
def test_variants_that_are_none(given: str) -> None:
    assert VARIANTS[given] in refused(f"eval.variants=[{given}]")


def test_only_lora_has_a_scale() -> None:
    assert "use anneal" in refused("eval.variants=[{lora_scale: 0.5}]", "model.lora=null")


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.variants=[{lora_scale: 0.5}, {anneal: 'power:2', lora_scale: 0.5}, {checkpoint: 40}, {checkpoint: 0}]"],
        ["eval.variants=[{checkpoint: 45}]", "train.steps=45"],
        ["eval.variants=[{anneal: linear}]", "model.lora=null"],
        ["objective.grad_steps=10"],
        ["objective.grad_steps=all", "sampler.steps=1"],
        ["objective.method=draft_lv"],
        ["objective.method=refl", "objective.refl.first=0", "objective.refl.hinge=-3"],
        ["objective.method=alignprop", "objective.alignprop.min_steps=3", "objective.alignprop.max_steps=3"],
        ["objective.method=drtune", "objective.grad_steps=all", "objective.drtune.early_stop=9"],
        DDPO,
        [*DDPO, "objective.grad_steps=all", "objective.ddpo.history=null", "objective.kl_coeff=1"],
        [*DDPO, "objective.ddpo.eta=0.1", "sampler.eta=0.5"],
        ["objective.alignprop.max_steps=40"],  # another method's settings do not matter
        ["train.steps=null", "train.epochs=2"],
        ["model.lora=null", "optim.grad_clip=null", "optim.ema=0.999", "optim.betas=[0, 0.5]"],
        ["sampler.guidance_scale=0", "objective.kl_coeff=50", "seed=-3"],
    ],
    ids=" ".join,
)
def test_what_fits(overrides: list[str]) -> None:
    settled(load_config(None, overrides))
