"""A run with a gate on the command line: pictures, exports and what they say of the gate, the report of a sweep."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from draftplus import api
from draftplus.models.lora_files import LORA_FILE
from draftplus.models.tuned import GATE
from tests.support.runs import small_settings, train_here

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
PROMPT = "a cat"
SETTINGS = ["sampler.steps=4", "objective.gate=0.5", "train.steps=1", "eval.every=1", "optim.lr=0.1"]


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return train_here(small_settings(small, tmp_path_factory.mktemp("gated")), "model.lora.alpha=8", *SETTINGS)


def ours(target: Any, **settings: Any) -> torch.Tensor:
    return api.generate(str(target), [PROMPT], [0], ["sampler.steps=4", "device=cpu"], **settings)[0]


def drawn(directory: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The picture of the card's lines, of our prompt."""
    code = re.search(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert code
    (directory / small.name).symlink_to(small)
    monkeypatch.chdir(directory)
    told: dict[str, Any] = {}
    exec(re.sub(r'prompt=".*"', f'output_type="pt", prompt="{PROMPT}"', code[1]), told)
    picture: torch.Tensor = told["image"]
    return picture


def test_diffusers_keeps_it(
    draftplus: Callable[..., Any], run: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = draftplus("export", run, "-o", tmp_path / "out")
    assert (printed.code, printed.err) == (0, "")
    made = ours(run)
    assert (drawn(tmp_path / "out", small, monkeypatch) - made).abs().max() < 1e-3
    assert (ours(run, anneal="tuned") - made).abs().max() > 1e-2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The base model draws the first 2 of 4 steps, as in training (`objective.gate`)." in card
    assert "These programs know of no gate" in card and "objective.gate=0.5" in card
    assert torch.equal(ours(small, adapter=tmp_path / "out"), made)


def test_kohya_says_what_it_loses(
    draftplus: Callable[..., Any], run: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = draftplus("export", run, "--format", "kohya", "-o", tmp_path / "out")
    assert printed.code == 0 and printed.err == (
        "draftplus: the format kohya has no gate: other programs than draftplus draw with the adapter in all 4 "
        "sampling steps, where in run the base model draws the first 2; README.md tells of it\n"
    )
    with safe_open(tmp_path / "out" / "run.safetensors", "pt") as opened:
        assert opened.metadata()[GATE] == "0.5"
    assert (ours(small, adapter=tmp_path / "out" / "run.safetensors") - ours(run)).abs().max() < 1e-4
    assert (drawn(tmp_path / "out", small, monkeypatch) - ours(run)).abs().max() < 1e-3
    assert "`end_at_step` 2" in (tmp_path / "out" / "README.md").read_text()


def test_merged_says_what_it_loses(
    draftplus: Callable[..., Any], run: Path, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = draftplus("export", run, "--format", "merged", "-o", tmp_path / "out")
    assert printed.code == 0
    assert "draftplus: the format merged has no gate: its tuned weights draw all 4 sampling steps" in printed.err
    tuned = ours(run, anneal="tuned")
    assert (ours(tmp_path / "out") - tuned).abs().max() < 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A merged model has none" in card and "callback" not in card


def test_without_a_gate_nothing_is_said(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    plain = train_here(settings, "train.steps=1")
    for form in ("kohya", "merged"):
        assert draftplus("export", plain, "--format", form).err == ""
        assert "gate" not in (plain / "export" / form / "README.md").read_text()
    with safe_open(plain / "adapter" / LORA_FILE, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_generate(draftplus: Callable[..., Any], refused: Callable[..., None], run: Path, tmp_path: Path) -> None:
    common = ["generate", run, "--prompt", PROMPT, "--seeds", "0"]
    made = {}
    for name, more in {"gated": [], "free": ["--anneal", "tuned"], "step": ["--anneal", "step:0.25"]}.items():
        assert draftplus(*common, *more, "-o", tmp_path / name).code == 0
        made[name] = next((tmp_path / name).glob("00-*.png")).read_bytes()
    assert len(set(made.values())) == 3
    refused([*common, "objective.gate=0"], r"objective\.gate is set in training", "use --anneal tuned for no gate")


def test_evaluate_names_the_gate(run: Path, small: Path, tmp_path: Path) -> None:
    told = api.evaluate([str(small), str(run)], ["device=cpu"], images_per_prompt=2, output=tmp_path)
    assert [target["gate"] for target in told["targets"]] == [0.0, 0.5]
    told = api.evaluate([str(run)], ["device=cpu"], images_per_prompt=2, anneal="step:0.25", output=tmp_path)
    assert {target["gate"] for target in told["targets"]} == {0.0}


def test_a_weight_that_would_do_nothing(refused: Callable[..., None], settings: list[str]) -> None:
    refused(
        ["train", *settings, "objective.kl_prefix_coeff=10"],
        r"kl_prefix_coeff is 10, but objective\.kl_steps=window looks at no .*; set objective\.kl_steps=trajectory",
    )


def test_a_report_of_what_was_trained(draftplus: Callable[..., Any], settings: list[str], tmp_path: Path) -> None:
    """Each gate has its line over λ, from the method without the term, and a run's page has the distance by step."""
    small = [*settings, "sampler.steps=4", "train.steps=2", "eval.every=1", "objective.kl_steps=trajectory"]
    runs = [
        train_here(small, f"name=g{gate}-l{rest}", f"objective.gate={gate}", f"objective.kl_prefix_coeff={rest}")
        for gate in (0, 0.5)
        for rest in (0, 10, 30)
    ]
    page = tmp_path / "page.html"
    assert draftplus("report", *runs, "-o", page).code == 0
    text = page.read_text()
    for name in ("DRaFT-1", "DRaFT-1, gate 0.5", "DRaFT+ on the path", "DRaFT+ on the path, gate 0.5"):
        assert f'"{name}"' in text, name
    assert "KL coefficient λ (logarithmic; 0 is DRaFT)" in text
    assert draftplus("report", runs[4]).code == 0
    text = (runs[4] / "report.html").read_text()
    assert "KL, by sampling step" in text and "the frozen model draws the first 2 of 4 steps" in text
