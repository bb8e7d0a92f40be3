"""The noise level of the last sampling step is told wherever somebody decides by it, with a line where it is small."""

from __future__ import annotations

import json
import re
import shutil
from math import sqrt
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import draftplus
from draftplus.errors import UserError, notice
from draftplus.runs.origin import read_origin
from draftplus.runs.plan import plan_run
from draftplus.training.dry_run import describe
from tests.support.runs import small_settings, train_here
from tests.tiny import SCHEDULER

STOCK = {"sampler.spacing=linear": 0.6, "sampler.steps=3": 0.0089, "sampler.sigmas=[0.9,0.4,0.1]": 0.25}


@pytest.fixture
def flow(small: Path, tmp_path: Path) -> Path:
    """The small model with the schedule of SD3.5."""
    directory = shutil.copytree(small, tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    return directory


def told(model: Path, directory: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[str, list[str]]:
    """What a dry run says of the last step, and the lines about its gradient."""
    notice.cache_clear()
    path = small_settings(model, directory)
    text = describe(
        *plan_run(path[0], ["sampler.steps=null" if "sigmas" in "".join(settings) else "seed=0", *settings])
    )
    line = re.search(r"last sampling step +at noise level σ = ([\d.]+), of x_t = α x_0 \+ σ ε\n", text)
    assert line
    return line[1], [one for one in capsys.readouterr().err.splitlines() if "carries gradient" in one]


@pytest.mark.parametrize("settings", STOCK)
def test_the_dry_run(flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str) -> None:
    sigma, lines = told(flow, tmp_path, capsys, settings)
    assert float(sigma) == pytest.approx(STOCK[settings], abs=1e-6)
    assert len(lines) == (STOCK[settings] < 0.05)
    assert all(
        "σ = 0.0089 multiplies the reward's gradient; sampler.spacing=linear makes it 0.6" in one for one in lines
    )


def test_of_a_variance_preserving_model(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sigma of its own form, in which alpha^2 + sigma^2 = 1; small ones are as they always were, and no news."""
    expected = sqrt(1 - float(DDIMScheduler(**SCHEDULER).alphas_cumprod[1]))
    sigma, lines = told(small, tmp_path, capsys)
    assert float(sigma) == pytest.approx(expected, rel=0.02) and expected < 0.05 and not lines


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["objective.method=draft_lv"], True),
        (["objective.method=alignprop", "objective.alignprop.max_steps=1"], True),
        (["objective.grad_steps=2"], False),
        (["objective.method=alignprop"], False),
        (["objective.method=refl", "objective.refl.first=0"], False),
        (["objective.method=drtune"], False),
        (["sampler.sigmas=[1,0.5,0.01]"], True),
    ],
)
def test_only_methods_that_look_at_the_last_step_alone_are_warned(
    flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], warned: bool
) -> None:
    assert len(told(flow, tmp_path, capsys, *settings)[1]) == warned


def test_where_no_spacing_helps(flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with Qwen-Image, whose shift stretches every schedule until it ends there."""
    FlowMatchEulerDiscreteScheduler(shift_terminal=0.02).save_pretrained(flow / "scheduler")
    sigma, lines = told(flow, tmp_path, capsys)
    assert sigma == "0.02" and len(lines) == 1 and "objective.grad_steps=3" in lines[0] and "spacing" not in lines[0]


def test_the_report_and_the_card(flow: Path, tmp_path: Path) -> None:
    run = train_here(small_settings(flow, tmp_path), "train.steps=1", "sampler.spacing=linear")
    origin = read_origin(run)
    assert origin and origin.last_sigma == pytest.approx(0.6)
    phrase = "gradient through the last of 3 sampling steps, the last step at noise level σ = 0.6, reward"
    assert phrase in draftplus.write_report(run).read_text()
    assert phrase in (draftplus.export(str(run), "diffusers") / "README.md").read_text()
    (run / "origin.json").unlink()  # as of an earlier version
    assert "noise level" not in draftplus.write_report(run).read_text()


def test_a_distance_of_velocities_is_of_flow_matching(small: Path, flow: Path, tmp_path: Path) -> None:
    wanted = ["objective.kl_space=velocity", "objective.kl_coeff=1", "train.steps=1"]
    with pytest.raises(UserError, match=r"^objective.kl_space=velocity is for flow-matching models.*use noise or x0$"):
        train_here(small_settings(small, tmp_path), "name=vp", *wanted)
    run = train_here(small_settings(flow, tmp_path), *wanted)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["kl"] == 0
