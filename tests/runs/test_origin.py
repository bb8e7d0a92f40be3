"""A run goes on with what it was started with: by content, wherever that lies."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from draftplus.config import ModelConfig, RewardConfig, load_config, run_name, trusting
from draftplus.data.prompts import load_prompts
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.models.stored import loaded_variant, stored_dtype
from draftplus.report import write_report
from draftplus.report.read import read_run
from draftplus.runs import inputs
from draftplus.runs.checksums import seal, unseal
from draftplus.runs.directory import write_config
from draftplus.runs.inputs import code_of, model_hashes, same_inputs
from draftplus.runs.origin import ORIGIN, read_origin, run_config, write_origin
from draftplus.runs.plan import plan_run, settled
from tests.support.runs import fingerprint, train_here
from tests.tiny import CPU

HERE = World(0, 1, CPU)

REWARD = "from helper import SCALE\n\n\ndef score(images, prompts):\n    return SCALE * images.mean((1, 2, 3))\n"


@pytest.fixture
def project(settings: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a recipe that names a model, prompts and a reward of its own by relative paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(small, tmp_path / "models" / "base")
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "helper.py").write_text("SCALE = 100\n")
    recipe = tmp_path / "small.yaml"
    text = recipe.read_text().replace(str(small), "models/base").replace(f"{tmp_path}/", "")
    recipe.write_text(text.replace("tests.support.rewards:redness", "mine:score"))
    for name in ("mine", "helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with trusting(True):  # what is refused here is refused of a run whose code is trusted
        yield tmp_path


def begin(*overrides: str) -> Path:
    """What a start and the first checkpoint leave of the inputs, without the training between."""
    config, run = plan_run("small.yaml", overrides)
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    write_config(run, config)
    prompts = load_prompts(config.data.prompts).train
    write_origin(run, config, same_inputs(config, run, prompts, HERE), 0)
    return run


def go_on(target: Path | str, *overrides: str) -> None:
    """As far as the check of the inputs."""
    config, run = plan_run(target, overrides)
    same_inputs(config, run, load_prompts(config.data.prompts).train, HERE)


def edit(path: str, *old_new: str) -> Callable[[], None]:
    def do() -> None:
        text = Path(path).read_text()
        assert old_new[0] in text
        Path(path).write_text(text.replace(*old_new))

    return do


def flip(path: str) -> Callable[[], None]:
    def do() -> None:
        data = bytearray(Path(path).read_bytes())
        data[-5] ^= 1
        Path(path).write_bytes(data)

    return do


CHANGES = {
    "prompts": ("data.prompts", edit("prompts.txt", "a cat", "a tiger")),
    "the order of prompts": ("data.prompts", edit("prompts.txt", "a cat\na dog\n", "a dog\na cat\n")),
    "reward": ("reward.mine:score", edit("mine.py", "SCALE *", "2 * SCALE *")),
    "what the reward imports": ("reward.mine:score", edit("helper.py", "100", "101")),
    "denoiser": ("model.path", flip("models/base/unet/diffusion_pytorch_model.safetensors")),
    "scheduler": ("model.path", edit("models/base/scheduler/scheduler_config.json", "0.012", "0.013")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_content_is_refused_by_name(project: Path, what: str) -> None:
    """And continues where the user says that it is meant."""
    key, change = CHANGES[what]
    run = begin()
    go_on(run)
    change()
    for target in (run, "small.yaml"):
        with pytest.raises(UserError, match=rf"run: {key} has another content than when it was started") as told:
            go_on(target)
    assert len(str(told.value).splitlines()) <= 2 and f"remove {run / ORIGIN}" in str(told.value)
    (run / ORIGIN).unlink()
    go_on(run)


def test_what_is_not_read_may_change(project: Path) -> None:
    run = begin()
    (project / "models" / "base" / "README.md").write_text("new")
    (project / "models" / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (project / "prompts.txt").write_text((project / "prompts.txt").read_text().replace("\n", "\r\n"))
    go_on(run)


def test_the_weights_that_count_are_those_that_are_loaded(small: Path, tmp_path: Path) -> None:
    """Beside the plain .bin files lies a variant, which the loader reads only where it is asked for."""
    model = shutil.copytree(small, tmp_path / "model")
    plain, other = model / "unet" / "diffusion_pytorch_model.bin", tmp_path / "unet"
    variant = model / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(variant)
    torch.save(load_file(variant), plain)
    shutil.copytree(small / "unet", other)
    chosen = {None: plain, "fp16": variant}
    for asked, read in chosen.items():
        config = ModelConfig(path=str(model), variant=asked)
        before, dtype = model_hashes(config), stored_dtype(config)
        assert dtype == torch.float32 and loaded_variant(config) == asked
        for file in chosen.values():
            whole = file.read_bytes()
            file.write_bytes(whole + b"more")
            assert (model_hashes(config) != before) is (file == read)
            replaced = ModelConfig(path=str(model), variant=asked, denoiser=str(other))
            changed = model_hashes(replaced)
            file.write_bytes(whole)
            assert model_hashes(replaced) == changed


def test_a_moved_file_is_the_same(project: Path) -> None:
    run = begin()
    shutil.move("models", "elsewhere")
    shutil.move("prompts.txt", "those.txt")
    go_on(run, "model.path=elsewhere/base", "data.prompts=those.txt")
    go_on("small.yaml", "model.path=elsewhere/base", "data.prompts=those.txt")
    with pytest.raises(UserError, match=r"models/base"):
        go_on(run)


def test_another_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths mean what they meant, also where something else lies at them."""
    named = run_name(settled(load_config("small.yaml", ["name=null"])), "small", False)
    run = begin("name=null")
    assert run.name == named, "the name of the same settings is as before"
    other = project / "other"
    shutil.copytree(project / "models", other / "models")
    monkeypatch.chdir(other)
    flip("models/base/unet/diffusion_pytorch_model.safetensors")()
    (other / "prompts.txt").write_text("a car\n" * 9)
    go_on(project / run)
    config = plan_run(project / run, [])[0]
    assert config.model.path == str(project / "models" / "base") and config.data.prompts == str(project / "prompts.txt")
    again = plan_run(project / run / "config.yaml", ["name=again"])[0]
    assert again.model.path == config.model.path, "as a recipe it repeats the run"


@pytest.mark.slow
def test_trained_from_elsewhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_here(["small.yaml"], "name=whole")
    run = train_here(["small.yaml"], "train.steps=2")
    monkeypatch.chdir("/")
    config, same = plan_run(project / run, ["train.steps=4"])
    from draftplus.training.train import train

    train(config, same)
    assert fingerprint(project / run) == fingerprint(project / whole)
    (project / "prompts.txt").write_text("".join(f"a car with {n} doors\n" for n in range(9)))
    with pytest.raises(UserError, match=r"data\.prompts has another content"):
        train(*plan_run(project / run, ["train.steps=6"]))
    origin = read_origin(project / run)
    assert origin is not None and origin.step == 0 and "data.prompts" in origin.inputs


def test_an_edited_configuration(project: Path, capsys: Any) -> None:
    """What may change is taken and told; what shapes the run is refused."""
    run = begin()
    edit(f"{run}/config.yaml", "steps: 4", "steps: 9")()
    assert plan_run(run, [])[0].train.steps == 9
    assert f"{run}/config.yaml was edited or damaged" in capsys.readouterr().err
    edit(f"{run}/config.yaml", "lr: 0.01", "lr: 0.02")()
    with pytest.raises(UserError, match=r"was started with optim\.lr=0\.01, but now it is 0\.02"):
        go_on(run)
    assert "config.yaml (optim.lr was 0.01, is 0.02: edited or damaged)" in read_run(run).missing


@pytest.mark.parametrize("started", [(), ("reward.mine:score.args.gain=2",), ("model.lora=null",)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("reward.mine:score.args.bias=1", r"without reward\.mine:score\.args\.bias, but now it is 1.* leave it out"),
        ("reward.jpeg_compressibility.weight=1", r"without reward\.jpeg_compressibility\.weight.* leave it out"),
        ("model.lora.rank=3", r"with model\.lora(\.rank)?=\w+, but now it is .*3.* set model\.lora(\.rank)?=\w+"),
    ],
)
def test_what_is_added_is_a_change(project: Path, started: tuple[str, ...], change: str, words: str) -> None:
    """Of what a configuration may have or not: a reward, one of its arguments, an adapter."""
    run = begin(*started)
    go_on(run)
    go_on("small.yaml", *started)
    for target, given in ((run, ()), ("small.yaml", started)):
        with pytest.raises(UserError, match=f"run was started {words}"):
            plan_run(target, [*given, change])


def test_what_is_taken_away_is_a_change(project: Path) -> None:
    run = begin("reward.mine:score.args.gain=2")
    with pytest.raises(UserError, match=r"was started with reward\.mine:score\.args\.gain=2"):
        plan_run("small.yaml", [])
    assert plan_run("small.yaml", ["reward.mine:score.args.gain=2"])[1] == run
    with pytest.raises(UserError, match=r"was started with model\.lora\.alpha="):
        plan_run(run, ["model.lora=null"])


def test_another_name_makes_a_new_run_beside_it(project: Path) -> None:
    """As the message says that refuses to continue with something else."""
    run = begin()
    for overrides, where in (
        (["name=other"], run.with_name("other")),
        ([f"name={run.name}"], run),
        (["output_dir=elsewhere"], Path("elsewhere") / run.name),
        (["name=a/b"], run.parent / "a" / "b"),
    ):
        config, found = plan_run(run, [*overrides, "train.steps=6"])
        assert found == where == Path(config.output_dir) / str(config.name)
    changed, other = plan_run(run, ["name=other", "optim.lr=0.5"])
    assert other.name == "other" and changed.optim.lr == 0.5
    with pytest.raises(UserError, match=r"name '\.\./x'"):
        plan_run(run, ["name=../x"])


@pytest.mark.parametrize("text", ["[]", '{"step": [1]}', '{"step": null}', "{}"])
def test_an_odd_best_in_a_report(project: Path, text: str) -> None:
    run = begin()
    (run / "best.json").write_text(text)
    write_report(run)
    assert any(one.startswith("best.json (") for one in read_run(run).missing)


@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.9])
def test_a_configuration_that_was_cut(project: Path, kept: float) -> None:
    """It is never filled with defaults; the command that started the run writes it again."""
    run = begin()
    whole = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(UserError, match=r"config\.yaml"):
        plan_run(run, [])
    config, same = plan_run("small.yaml", [])
    write_config(same, config)
    assert (run / "config.yaml").read_text() == whole


def test_a_record_that_is_damaged(project: Path) -> None:
    run = begin()
    edit(f"{run}/{ORIGIN}", "0.01", "0.02")()
    with pytest.raises(UserError, match=r"origin\.json: damaged .*remove it"):
        plan_run(run, [])


def test_texts_that_are_no_files(project: Path) -> None:
    """Among a reward's arguments, and for its path: other text is no file, and nobody reads a whole disk."""
    (project / "data.json").write_text("{}")
    (project / "weights").mkdir()
    (project / "weights" / "a.pt").write_text("1")
    texts = {"a": "/", "b": ".", "c": "", "d": "~nobody-of-this-name/x", "e": "x" * 300, "f": "a\0b", "g": "/dev/zero"}
    given = RewardConfig(path="https://example.org/w.pt", args={**texts, "h": "data.json", "i": "weights", "j": 3})
    assert inputs._reward("mine:score", given).keys() == {
        "reward.mine:score", "reward.mine:score.path", "reward.mine:score.args.h", "reward.mine:score.args.i",
    }  # fmt: skip


def test_a_helper_that_cannot_be_read_is_followed_no_further(project: Path) -> None:
    (project / "mine.py").write_text("try:\n    import old\nexcept SyntaxError:\n    pass\n" + REWARD)
    (project / "old.py").write_text("print 'of Python 2'\n")
    run = begin()
    go_on(run)
    (project / "old.py").write_text("print 'another'\n")
    with pytest.raises(UserError, match=r"reward\.mine:score has another content"):
        go_on(run)


def test_code_that_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages, relative imports and what they import; not what lies beside them, nor installed libraries."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "rewards_of_mine"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("import json\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "good.py").write_text("from ..shared import one\nfrom . import beside\nimport torch\n")
    (package / "inner" / "beside.py").write_text("")
    (package / "shared.py").write_text("import top_of_mine\none = 1\n")
    (package / "unused.py").write_text("")
    (tmp_path / "top_of_mine.py").write_text("")
    import importlib

    importlib.import_module("rewards_of_mine.inner.good")
    names = {
        "rewards_of_mine __init__.py", "rewards_of_mine.inner __init__.py", "rewards_of_mine.inner.good good.py",
        "rewards_of_mine.inner.beside beside.py", "rewards_of_mine.shared shared.py", "top_of_mine top_of_mine.py",
    }  # fmt: skip
    assert code_of("rewards_of_mine.inner.good").keys() == names
    (tmp_path / "top_of_mine.py").write_text("print 'of another Python'\n")  # which an import may try, and do without
    assert code_of("rewards_of_mine.inner.good").keys() == names


def test_a_run_from_before_auto_followed_the_model(project: Path) -> None:
    """It keeps DDIM, whatever its model's scheduler, and is told apart by a key that it does not know."""
    file = project / "models" / "base" / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text())
    assert plan_run(begin("name=plain"), ())[0].sampler.solver == "auto"
    for cls, then in (("DDIMScheduler", "auto"), ("EulerDiscreteScheduler", "ddim"), (None, "auto")):
        file.write_text(json.dumps({**told, "_class_name": cls}))
        run = begin(f"name={cls}")
        go_on(run)  # of this version
        config = yaml.safe_load((run / "config.yaml").read_text())
        del config["sampler"]["sigmas"]
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        for origin in ("with", "without"):
            if origin == "with":
                sealed = unseal((run / ORIGIN).read_text())
                del sealed["config"]["sampler.sigmas"], sealed["last_sigma"]
                (run / ORIGIN).write_text(seal(sealed))
            else:
                (run / ORIGIN).unlink()
            assert plan_run(run, ())[0].sampler.solver == then
            assert run_config(run).sampler.solver == then
            if then == "ddim":
                with pytest.raises(UserError, match=r"started with sampler\.solver=ddim, but now it is auto"):
                    plan_run("small.yaml", [f"name={cls}"])
            go_on("small.yaml", f"name={cls}", f"sampler.solver={then}")
