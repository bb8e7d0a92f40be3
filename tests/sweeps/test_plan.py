"""All runs of a sweep are checked before the first starts, and a sweep file says the same as the command line."""

import pytest
from omegaconf import OmegaConf

from draftplus import progress
from draftplus.errors import UserError
from draftplus.sweeps.plan import plan_sweep

FILE = """
recipe: demo
name: mine
grid:
  seed: [0, 1]
runs:
  - objective.grad_steps: [1, 2]
    objective.kl_coeff: 0
  - {objective.method: draft_lv, optim.betas: [[0.9, 0.99]]}
"""


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"objective.kl_coef": ["0", "1"]}, r"objective\.kl_coef.*did you mean 'objective\.kl_coeff'"),
        ({"objective.kl_coeff": ["0", "-1"]}, r"objective\.kl_coeff is -1"),
        ({"train.steps": ["many"]}, r"train\.steps=many: train\.steps"),
        ({"objective.grad_steps": ["1", "99"]}, r"objective\.grad_steps=99: .*sampler\.steps"),
        ({"train.micro_batch_size": ["3"]}, r"train\.micro_batch_size=3"),
        ({"data.prompts": ["animals", "no.txt"]}, r"data\.prompts=no\.txt: .*no\.txt"),
        ({"eval.images_per_prompt": ["1"]}, r"eval\.images_per_prompt is 1"),
        ({"optim.lr": ["1", "1.0"]}, r"optim\.lr=1\.0 is the same run as optim\.lr=1"),
        ({"name": ["a"]}, "cannot range over name"),
        ({}, "the grid is empty"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(tmp_path, grid, said):
    with pytest.raises(UserError, match=said):
        plan_sweep("emoji", grid, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_and_recipes(tmp_path):
    seeds = {"seed": ["0"]}
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        plan_sweep("emojy", seeds, None, tmp_path)
    for name in ("a/b", "..", "a=b"):
        with pytest.raises(UserError, match="give a plain name"):
            plan_sweep("emoji", seeds, name, tmp_path)
    same, other = plan_sweep("emoji", seeds, None, tmp_path), plan_sweep("emoji", {"seed": ["1"]}, None, tmp_path)
    assert same.directory == plan_sweep("emoji", seeds, None, tmp_path).directory != other.directory
    assert same.directory.name.startswith("emoji-")


def test_a_sweep_file_is_a_recipe_a_grid_and_runs(tmp_path):
    (tmp_path / "sweep.yaml").write_text(FILE)
    plan = plan_sweep(tmp_path / "sweep.yaml", {}, None, tmp_path)
    assert (plan.recipe, plan.directory) == ("demo", tmp_path / "mine")
    assert [run.name for run in plan.runs] == [
        "grad_steps-1_kl_coeff-0_seed-0", "grad_steps-1_kl_coeff-0_seed-1", "grad_steps-2_kl_coeff-0_seed-0",
        "grad_steps-2_kl_coeff-0_seed-1", "method-draft_lv_betas-0.9-0.99_seed-0",
        "method-draft_lv_betas-0.9-0.99_seed-1",
    ]  # fmt: skip
    last = plan.runs[-1].config
    assert (last.seed, last.optim.betas, last.objective.method) == (1, [0.9, 0.99], "draft_lv")
    assert last.objective.kl_coeff == 10.0  # the recipe's
    over = plan_sweep(tmp_path / "sweep.yaml", {"seed": ["7"], "train.steps": ["2"]}, None, tmp_path)
    assert {run.config.seed for run in over.runs} == {7} and {run.steps for run in over.runs} == {2}
    assert over.directory != plan.directory


def test_a_file_without_a_grid_is_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: emoji\noptim: {lr: 0.5}\n")
    plan = plan_sweep(tmp_path / "mine.yaml", {"seed": ["0", "1"]}, None, tmp_path)
    assert [run.config.optim.lr for run in plan.runs] == [0.5, 0.5] and plan.directory.name.startswith("mine-")
    (tmp_path / "sweep.yaml").write_text("recipe: mine.yaml\ngrid: {seed: [0]}\n")
    beside = plan_sweep(tmp_path / "sweep.yaml", {}, None, tmp_path)
    assert beside.runs[0].config.optim.lr == 0.5 and beside.directory.name == "sweep"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: emoji\ngird: {seed: [0]}\n", "unknown key 'gird'; did you mean 'grid'"),
        ("recipe: 3\ngrid: {seed: [0]}\n", "recipe is 3"),
        ("grid: [0]\n", "grid is .*give a mapping"),
        ("runs: {seed: 0}\n", "runs is .*give a list"),
        ("grid: {seed: []}\n", "seed has no values"),
        ("grid: {}\n", "the grid is empty"),
        ("grid: {seed: [0]\n", "not a YAML file"),
        ("grid: {seed: [0]}\nruns: [{seed: 1}]\n", "seed is in the grid"),
        ("grid: {reward: ['{emoji_clip: {}}']}\n", "neither a built-in reward nor of the form package.module:object"),
        ("grid: {reward: [emoji_clipp]}\n", "did you mean 'emoji_clip'"),
    ],
)
def test_mistakes_in_a_sweep_file(tmp_path, text, said):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        plan_sweep(tmp_path / "sweep.yaml", {}, None, tmp_path)


def test_a_finished_run_is_not_continued_with_a_changed_key(tmp_path):
    plan = plan_sweep("emoji", {"seed": ["0", "1"], "optim.lr": ["0.1"]}, "s", tmp_path)
    run = plan.directory / "seed-0"
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    from draftplus.config import to_yaml

    (run / "config.yaml").write_text(to_yaml(plan.runs[0].config))
    plan_sweep("emoji", {"seed": ["0", "1"], "optim.lr": ["0.1"]}, "s", tmp_path)
    with pytest.raises(UserError, match=r"optim\.lr=0\.1, but now it is 0\.2"):
        plan_sweep("emoji", {"seed": ["0", "1"], "optim.lr": ["0.2"]}, "s", tmp_path)


def test_many_runs_are_planned_quickly_and_not_in_silence(tmp_path, monkeypatch, capsys):
    """What takes long, the defaults as OmegaConf has them, is made once and not for each run."""
    made, structured = [], OmegaConf.structured
    monkeypatch.setattr(OmegaConf, "structured", lambda *given, **more: made.append(1) or structured(*given, **more))
    for name in ("QUIET", "FIRST", "APART"):
        monkeypatch.setattr(progress, name, 0.0)
    plan = plan_sweep("emoji", {"seed": [str(seed) for seed in range(30)]}, None, tmp_path)
    assert [run.config.seed for run in plan.runs] == list(range(30)) and len(made) <= 2
    assert "planning: 30 of 30 runs" in capsys.readouterr().err
