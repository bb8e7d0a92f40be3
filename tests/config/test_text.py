"""Text stays as it is written; what a file says stays in the file; and advice can be followed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from draftplus.config import (
    Config,
    all_keys,
    facts_of,
    is_text,
    load_config,
    load_run_config,
    run_name,
    to_yaml,
    written,
)
from draftplus.errors import UserError

TEXTS = [
    "no", "yes", "on", "off", "1e5", "007", "12:30:45", "2025_06_01", "2025-06-01", "low quality # comment", "a: b",
    "[deformed | disfigured], poorly drawn", "{a", "*", "&a", "!b", "%", "- a", "it's", '"a" and "b"', "'tis, 'tis'",
    "${oc.env:HOME}", "${", "\\${x}", "\\\\${", "a\nb", " spaced ", "~", "Null", "none", "#1 dad", "é\u2028", "=", "",
    "a=b", "ünï 🦊", "\x07", "true",
]  # fmt: skip


def refused(*overrides: str, recipe: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    assert str(error.value).count("\n") <= 1
    return str(error.value)


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_literal_and_kept(tmp_path: Path, text: str) -> None:
    made = load_config(None, [f"sampler.negative_prompt={text}", f"reward.clip.path={text}"])
    assert made.sampler.negative_prompt == text and made.reward["clip"].path == text
    (tmp_path / "config.yaml").write_text(to_yaml(made), encoding="utf-8")
    assert load_run_config(tmp_path) == load_config(tmp_path / "config.yaml") == made
    assert load_config(None, [f"sampler.negative_prompt={written(text)}"]).sampler.negative_prompt == text


def test_null_is_no_text_and_the_word_stands_in_quotes(tmp_path: Path) -> None:
    assert load_config(None, ["sampler.negative_prompt=null"]).sampler.negative_prompt is None
    for quoted in ('"null"', "'null'"):
        made = load_config(None, [f"sampler.negative_prompt={quoted}"])
        assert made.sampler.negative_prompt == "null"
        (tmp_path / "config.yaml").write_text(to_yaml(made), encoding="utf-8")
        assert load_run_config(tmp_path) == made


@pytest.mark.parametrize("text", TEXTS)
def test_text_among_a_rewards_arguments_is_kept(tmp_path: Path, text: str) -> None:
    made = load_config()
    made.reward["emoji_clip"].args = {"a": {"b": [text]}, "c": text}
    (tmp_path / "config.yaml").write_text(to_yaml(made), encoding="utf-8")
    assert load_run_config(tmp_path) == made


def test_a_rewards_arguments_are_yaml() -> None:
    made = load_config(None, ["reward.clip.args={a: 1, b: [no, x]}", "reward.clip.args.c=1e5", "reward.clip.args.a=2"])
    assert made.reward["clip"].args == {"a": 2, "b": [False, "x"], "c": 1e5}


@pytest.mark.parametrize("word", ["no", "on", "1e5", "007", "12:30:45", "2025_06_01", "1.0"])
def test_a_word_that_yaml_takes_for_something_else_is_refused(tmp_path: Path, word: str) -> None:
    path = tmp_path / "recipe.yaml"
    for text in (f"name: {word}", f"log: {{to: [{word}]}}"):
        path.write_text(text)
        message = refused(recipe=path)
        assert "YAML reads this word as" in message and "write it in quotes" in message
    path.write_text(f"name: '{word}'\nsampler: {{negative_prompt: '{word}'}}")
    assert load_config(path).name == load_config(path).sampler.negative_prompt == word
    assert "write it in quotes" in refused(f"sampler={{negative_prompt: {word}}}")


@pytest.mark.parametrize("key", [key for key, f in all_keys() if is_text(key) and not facts_of(f).choices])
def test_every_key_of_text_is_literal(key: str) -> None:
    section, _, last = key.rpartition(".")
    made = load_config(None, [f"{key}=1e5"])
    assert getattr(getattr(made, section) if section else made, last) == "1e5"


def test_the_example_in_a_message_is_accepted() -> None:
    """Of every key that refuses a value of the wrong type."""
    tried = 0
    for key, _ in all_keys():
        for wrong in ("[[1]]", "{a: {b: 1}}"):
            try:
                load_config(None, [f"{key}={wrong}"])
            except UserError as error:
                message = str(error)
                if "; for example, " not in message:
                    continue
                example = message.partition("; for example, ")[2]
                assert example.startswith(key)
                load_config(None, ["eval.rewards.jpeg_compressibility.weight=1", example])
                tried += 1
    assert tried > 50


def test_a_key_newer_than_the_first_release_does_not_rename_runs() -> None:
    plain = load_config()
    named = run_name(plain, "emoji", False)
    assert named == "emoji-1c4727c4" and run_name(load_config(None, ["data.column=x"]), "emoji", False) != named
    assert run_name(replace(plain, data=replace(plain.data, column="x")), "emoji", False) != named


UNREACHABLE = [
    "a@b", "a=b", "..", "../x", "a/../b", "/abs", "a/", "~", "~/x", "a\nb", "\x1b[2J", " a", "-x", "", " ", "x" * 201,
    "é" * 101, "a\\b", ".",
]  # fmt: skip
NAMES = ["007", "2025_06_01", "12:30:45", "on", "1e5", "a/b", "a.b", "x" * 200, "münchen", "a b"]


@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_name_that_nothing_could_reach(name: str) -> None:
    message = refused(f"name={name}")
    assert message.startswith("name ") and "\x1b" not in message


@pytest.mark.parametrize(
    "name", ["007", "2025_06_01", "12:30:45", "on", "1e5", "a/b", "a.b", "x" * 200, "münchen", "a b"]
)
def test_a_name_is_kept_as_it_is(name: str) -> None:
    assert load_config(None, [f"name={name}"]).name == name


def test_no_variable_of_the_environment_gets_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    path = tmp_path / "recipe.yaml"
    for value in ("${oc.env:SECRET_TOKEN}", "a ${oc.env:SECRET_TOKEN,x}", "${oc.decode:1}", "${model.path}"):
        for line in (f"name: {value}", f"reward: {{clip: {{args: {{a: ['{value}']}}}}}}"):
            path.write_text(line)
            message = refused(recipe=path)
            assert "not resolved" in message and "hunter2" not in message
    path.write_text("sampler: {negative_prompt: '\\${oc.env:SECRET_TOKEN}'}")
    assert load_config(path).sampler.negative_prompt == "${oc.env:SECRET_TOKEN}"


@pytest.mark.parametrize(
    "content", ["root:$y$hash:19000:0:99999:7:::\nbin:*:1:0:9:7:::\n", "root:x:0:0:root:/root:/bin/sh\n", "my secret",
                "pass word: secret\n", "secret key : [1", '{"my secret": 1}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["shadow", "shadow.yaml"])
def test_what_is_no_recipe_is_not_printed(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "recipe.yaml").write_text(f"extends: {tmp_path / name}")
    for recipe in (tmp_path / "recipe.yaml", tmp_path / name):
        message = refused(recipe=recipe)
        assert name in message
        assert not any(word in message.replace(str(tmp_path), "") for word in ("secret", "root", "hash", "$y$"))


def test_a_configuration_made_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"optim\.lr: 'fast' is not a number"):
        load_config(None, base=replace(Config(), optim=replace(Config().optim, lr="fast")))  # type: ignore[arg-type]
    assert load_config(None, base=replace(Config(), output_dir=Path("x"))).output_dir == "x"  # type: ignore[arg-type]
