"""Recipes, overrides and the names that runs get from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftplus.config import (
    Config,
    RewardConfig,
    all_keys,
    describe_keys,
    facts_of,
    flatten,
    load_config,
    nearest,
    recipe_names,
    run_name,
    shaping_keys,
    to_dict,
    to_yaml,
    trusting,
)
from draftplus.errors import UserError
from draftplus.training.fine_tuning import micro_batch_size


def refused(*overrides: str, recipe: str | Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    message = str(error.value)
    assert message.count("\n") <= 1
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe; returns its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def test_a_recipe_is_the_file_that_is_named(tmp_path):
    """Nor one beside it, whose name ends once more."""
    (tmp_path / "mine.yaml").write_text("seed: 1")
    (tmp_path / "mine.yaml.yaml").write_text("seed: 2")
    assert load_config(tmp_path / "mine.yaml").seed == 1
    with pytest.raises(UserError, match="no such file or built-in recipe"):
        load_config(tmp_path / "mine")


@pytest.mark.parametrize(
    ("override", "nearest_key"),
    [
        ("lr=1", "optim.lr"),
        ("optim.lrr=1", "optim.lr"),
        ("optim.learning_rate=1", None),
        ("optm.lr=1", "optim"),
        ("sampler.step=3", "sampler.steps"),
        ("sample.steps=3", "sampler"),
        ("guidance_scale=3", "sampler.guidance_scale"),
        ("sampler.guidance=3", "sampler.guidance_scale"),
        ("kl_coef=1", "objective.kl_coeff"),
        ("objective.kl=1", None),
        ("objective.refl.hinges=1", "objective.refl.hinge"),
        ("model.lora.rnk=3", "model.lora.rank"),
        ("model.lora={rnk: 3}", "model.lora.rank"),
        ("global_batch_size=3", "train.global_batch_size"),
        ("reward.emoji_clip.weigth=2", "reward.emoji_clip.weight"),
        ("reward={clip: {wieght: 2}}", "reward.clip.weight"),
        ("eval.rewards.clip.pth=2", "eval.rewards.clip.path"),
        ("train.warmup=3", "optim.warmup_steps"),
        ("xyzzy=3", None),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest_key: str | None) -> None:
    message = refused(override)
    assert message.startswith("unknown key '")
    if nearest_key is not None:
        assert f"did you mean '{nearest_key}'?" in message


def test_an_unknown_key_of_a_recipe_names_the_nearest(recipe: Any) -> None:
    assert "did you mean 'optim.lr'?" in refused(recipe=recipe("optim: {ir: 1}"))
    assert "unknown key '1'" in refused(recipe=recipe("1: 2"))
    assert "draftplus train --help lists all keys" in refused("zzzzz=1")


def test_a_letter_too_many_finds_every_key() -> None:
    for key, _ in all_keys():
        assert refused(f"{key}x=1") == f"unknown key '{key}x'; did you mean '{key}'?"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=abc", "seed: 'abc' is not a whole number; for example, seed=0"),
        ("seed=1.5", "seed: 1.5 is not a whole number"),
        ("train.steps=1.5", "train.steps: 1.5 is not a whole number; for example, train.steps=80"),
        ("optim.lr=fast", "optim.lr: 'fast' is not a number; for example, optim.lr=0.001"),
        ("optim.betas=0.9", "optim.betas: 0.9 is not a list, each a number; for example, optim.betas=[0.9, 0.999]"),
        ("optim.betas=[a,b]", "optim.betas[0]"),
        ("model=emoji", "model: "),
        (
            "model.lora=3",
            "model.lora: 3 is not a section; its keys are rank, alpha, targets; for example, model.lora.rank=8",
        ),
        ("sampler=3", "sampler: "),
        ("log=null", "log: "),
        ("log.to=wandb", "log.to: 'wandb' is not a list, each text; for example, log.to=[\"tensorboard\"]"),
        ("device=null", "device: null is not text; for example, device=auto"),
        ("reward.clip.weight=x", "reward.clip.weight: 'x' is not a number"),
        ("reward.emoji_clip=3", "reward.emoji_clip: "),
        ("eval.rewards=pickscore", "eval.rewards: 'pickscore' is not a mapping"),
        ("eval.every=null", "eval.every: "),
        ("sampler.steps=[", "sampler.steps=[: cannot read the value"),
        ("sampler.steps=[1", "not a YAML file: line"),
        ("optim.lr=${train.steps}", "references such as ${oc.env:NAME} are not resolved"),
        ("reward.clip.args.a=${oc.env:HOME}", "reward.clip.args.a: references"),
        ("sampler.steps=???", "sampler.steps is ???"),
        ("sampler.negative_prompt=???", "sampler.negative_prompt is ???"),
        ("sampler.negative_prompt=a\udcff", "not valid Unicode"),
        ("=3", "expected KEY=VALUE"),
        ("sampler.steps", "expected KEY=VALUE"),
    ],
)
def test_a_wrong_value_names_its_key(override: str, says: str) -> None:
    assert says in refused(override)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "recipe.yaml: not a YAML file: line 2, column 1: did not find expected node content"),
        ("a: 1\n\tx: 1", "not a YAML file: line 2, column 1: found a tab character that violates indentation"),
        ("seed: 1\nseed: 2", "not a YAML file: line 2, column 1: found duplicate key seed"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed in this context; put text that contains ': ' in"),
        ("name: a\x00b", "not a YAML file: control characters are not allowed"),
        ("name: ${", "${ begins a reference, which is not supported"),
        ("3", "not a YAML file"),
        ("- seed", "expected keys and values, found list"),
        ("just words", "not a YAML file of keys and values"),
        ("train: 3", "train: "),
        ("train:", "train: "),
        ("eval: {rewards: [a]}", "eval"),
        ("reward:", "reward: expected a name or a mapping"),
        ("extends: nowhere", "recipe 'nowhere': no such file"),
        ("extends: emojii", "did you mean 'emoji'?"),
        ("extends: [emoji]", "extends is ['emoji']"),
        ("extends: recipe.yaml", "extends itself"),
    ],
)
def test_a_recipe_that_cannot_be_read(recipe: Any, text: str, says: str) -> None:
    assert says in refused(recipe=recipe(text))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    assert "did you mean 'emoji'?" in refused(recipe="emojy")
    assert "no such file or built-in recipe; built in: " in refused(recipe="nothing-like-it")
    assert "no such file" in refused(recipe=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a YAML file" in refused(recipe=tmp_path / "binary.yaml")


def test_layers_in_order(recipe: Any) -> None:
    path = recipe("seed: 5\noptim: {lr: 0.5, warmup_steps: 3}\nobjective: {grad_steps: all}")
    made = load_config(path, ["optim.lr=1e-4", "seed=7", "seed=8"])
    assert (made.seed, made.optim.lr, made.optim.warmup_steps) == (8, 1e-4, 3)
    assert made.objective.grad_steps == "all" and made.sampler == Config().sampler
    assert load_config() == Config() == load_config(recipe(""))
    assert load_config(None, ["optim.lr=2"], base=made).seed == 8


def test_extends(recipe: Any) -> None:
    recipe("seed: 5\noptim: {lr: 0.5, warmup_steps: 3}\nreward: {a: {weight: 3}}", "base.yaml")
    recipe("extends: base.yaml\noptim: {lr: 0.25}", "middle.yaml")
    made = load_config(recipe("extends: middle.yaml\nseed: 6"), ["optim.warmup_steps=1"])
    assert (made.seed, made.optim.lr, made.optim.warmup_steps) == (6, 0.25, 1)
    assert made.reward == {"a": RewardConfig(weight=3.0)}
    assert load_config(recipe("extends: emoji\nseed: 4")).seed == 4
    assert load_config(recipe("extends: base.yaml\nreward: b")).reward == {"b": RewardConfig()}


def test_recipes_that_extend_each_other(recipe: Any) -> None:
    recipe("extends: recipe.yaml", "other.yaml")
    assert "extends itself through" in refused(recipe=recipe("extends: other.yaml"))


def test_built_in_recipes_load() -> None:
    assert {"emoji", "demo"} <= set(recipe_names())
    for name in recipe_names():
        assert isinstance(load_config(name), Config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"emoji_clip": (1.0, None)}),
        (["reward=clip"], {"clip": (1.0, None)}),
        (["reward=pkg.mod:obj"], {"pkg.mod:obj": (1.0, None)}),
        (["reward={a: {weight: 2}, b: {}}"], {"a": (2.0, None), "b": (1.0, None)}),
        (["reward={a: }"], {"a": (1.0, None)}),
        (["reward.clip.weight=2"], {"emoji_clip": (1.0, None), "clip": (2.0, None)}),
        (["reward.emoji_clip.weight=2"], {"emoji_clip": (2.0, None)}),
        (["reward.emoji_clip.path=x"], {"emoji_clip": (1.0, "x")}),
        (["reward=a", "reward.b.weight=3"], {"a": (1.0, None), "b": (3.0, None)}),
        (["reward.b.weight=3", "reward=a"], {"a": (1.0, None)}),
        (["reward.a.weight=3", "reward.a.path=y"], {"emoji_clip": (1.0, None), "a": (3.0, "y")}),
    ],
    ids=str,
)
def test_rewards_replace_or_merge(overrides: list[str], expected: dict[str, Any]) -> None:
    made = load_config(None, overrides).reward
    assert {name: (one.weight, one.path) for name, one in made.items()} == expected
    assert all(isinstance(one, RewardConfig) for one in made.values())


def test_a_recipes_rewards_replace_the_default(recipe: Any) -> None:
    path = recipe("reward: {a: {weight: 2}}")
    assert list(load_config(path).reward) == ["a"]
    assert list(load_config(path, ["reward.b.weight=1"]).reward) == ["a", "b"]
    assert load_config(path, ["reward.a.path=x"]).reward == {"a": RewardConfig(weight=2.0, path="x")}
    assert list(load_config(path, ["eval.rewards.c.weight=1"]).eval.rewards) == ["c"]


@pytest.mark.parametrize("value", ["null", "{}", "[a]", "3"])
def test_a_reward_that_is_none(value: str) -> None:
    assert "reward: expected a name or a mapping of names" in refused(f"reward={value}")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.lora=null", "objective.grad_steps=all", "name=null", "train.steps=null", "train.epochs=3"],
        ["reward={pkg.mod:obj: {weight: 2, path: 'a: b', args: {k: [1, x, null]}}, b: {}}", "name=x y"],
        ["sampler.negative_prompt='blurry: yes, # no'", "data.prompts=a b.txt", "optim.lr=1e-7"],
        ["model.lora.targets=[to_q, conv_in]", "sampler.negative_prompt='3'", "name='null'", "output_dir='1e3'"],
        ["eval.rewards={a: {path: b}}", "log.to=[]", "optim.ema=0.999", "optim.grad_clip=null"],
    ],
    ids=lambda overrides: " ".join(overrides)[:40],
)
def test_yaml_round_trip(recipe: Any, overrides: list[str]) -> None:
    made = load_config(None, overrides)
    text = to_yaml(made)
    with trusting(True):
        assert load_config(recipe(text)) == made
        assert to_yaml(load_config(recipe(text))) == text
        assert load_config(recipe("extends: recipe.yaml", "child.yaml"), ["seed=1"]).model == made.model
    assert set(flatten(to_dict(made))) >= {key for key, _ in all_keys()} - {
        "reward", "model.lora.rank", "model.lora.alpha", "model.lora.targets", "eval.rewards",
    }  # fmt: skip


CHANGEABLE = [
    "name=x", "output_dir=elsewhere", "device=cpu", "model.gradient_checkpointing=true", "train.steps=100",
    "train.epochs=3", "train.micro_batch_size=2", "train.sampling_batch_size=4", "train.compile=true",
    "eval.every=7",
    "eval.rewards.a.weight=1", "eval.prompts=x", "checkpoint.every=7", "checkpoint.keep=3",
    "parallel.mode=replicate", "log.to=[]",
]  # fmt: skip
SHAPING = [
    "seed=1", "model.path=x", "model.dtype=bfloat16", "model.lora.rank=4", "model.lora=null", "model.denoiser=x",
    "sampler.steps=11", "sampler.eta=0.5", "sampler.guidance_scale=3", "sampler.negative_prompt=x",
    "sampler.spacing=trailing", "objective.method=refl", "objective.grad_steps=2", "objective.kl_coeff=1",
    "objective.kl_space=x0", "objective.refl.hinge=1", "reward=clip", "reward.emoji_clip.weight=2",
    "reward.emoji_clip.args={a: 1}", "data.prompts=x", "data.images_per_prompt=2", "optim.lr=1", "optim.ema=0.9",
    "optim.betas=[0.8, 0.9]", "optim.grad_clip=null", "train.global_batch_size=16",
]  # fmt: skip


@pytest.mark.parametrize("override", CHANGEABLE)
def test_what_may_change_keeps_the_runs_name(override: str) -> None:
    base, changed = load_config(), load_config(None, [override])
    assert base != changed and shaping_keys(base, False) == shaping_keys(changed, False)
    if not override.startswith("name="):
        assert run_name(base, "emoji", False) == run_name(changed, "emoji", False)


@pytest.mark.parametrize("override", SHAPING)
def test_what_shapes_the_trajectory_changes_it(override: str) -> None:
    base, changed = load_config(), load_config(None, [override])
    assert shaping_keys(base, False) != shaping_keys(changed, False)
    assert run_name(base, "emoji", False) != run_name(changed, "emoji", False)


def test_the_micro_batch_shapes_what_compares_its_images() -> None:
    base, changed = (load_config(None, ["reward=dissimilarity", f"train.micro_batch_size={n}"]) for n in (8, 4))
    assert shaping_keys(base, True) != shaping_keys(changed, True)
    assert run_name(base, "emoji", True) != run_name(changed, "emoji", True)
    assert micro_batch_size(base, 1) == 8 and micro_batch_size(changed, 2) == 4
    with pytest.raises(UserError, match=r"each of 2 processes has 4; set train\.micro_batch_size=4"):
        micro_batch_size(base, 2)


def test_run_names() -> None:
    name = run_name(load_config(), "emoji", False)
    prefix, _, digits = name.partition("-")
    assert prefix == "emoji" and len(digits) == 8 and int(digits, 16) >= 0
    assert run_name(load_config(), "other", False) == f"other-{digits}"
    assert run_name(load_config(None, ["name=mine"]), "emoji", False) == "mine"
    # the order in which rewards are written is not a choice
    a, b = (load_config(None, [f"reward={{{text}}}"]) for text in ("a: {}, b: {}", "b: {}, a: {}"))
    assert run_name(a, "emoji", False) == run_name(b, "emoji", False)


def test_run_names_are_the_same_in_every_process() -> None:
    code = "from draftplus.config import *; print(run_name(load_config(), 'emoji', False))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(seed)
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {run_name(load_config(), "emoji", False)}


def environment(hash_seed: str = "0") -> dict[str, str]:
    paths = [str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, draftplus, draftplus.config, draftplus.errors; draftplus.config.load_config('emoji', ['seed=1']);"
        "heavy = {'torch', 'numpy', 'transformers', 'diffusers', 'peft'} & set(sys.modules); sys.exit(str(heavy)"
        " if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_line_of_help() -> None:
    lines = describe_keys().splitlines()
    keys = dict(all_keys())
    assert len(lines) == len(keys)
    for line, (key, f) in zip(lines, keys.items(), strict=True):
        assert line.strip().startswith(f"{key}=") and line.endswith(facts_of(f).meaning) and facts_of(f).meaning


def test_nearest() -> None:
    words = ["optim.lr", "train.steps", "sampler.steps", "objective.kl_coeff"]
    assert nearest("optim.rl", words) == "did you mean 'optim.lr'?"
    assert nearest("klcoeff", words) == "did you mean 'objective.kl_coeff'?"
    assert nearest("trian.steps", words) == "did you mean 'train.steps'?"
    assert nearest("qqq", words) == ""
