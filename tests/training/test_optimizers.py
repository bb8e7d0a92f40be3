"""Every optimizer: what it does to the weights, what it remembers, and that a run continues exactly with it."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from draftplus.config import load_config
from draftplus.config.check import check
from draftplus.config.schema import OptimConfig
from draftplus.errors import UserError
from draftplus.training import optim
from draftplus.training.optim import Parameters, make_optimizer, optimizer_tensors
from draftplus.training.state import initial_state, numbers_of, put_back, tensors_of
from tests.support.processes import command
from tests.support.runs import rows, train_here
from tests.training.test_resume import assert_same_run

eight_bit = pytest.param(
    "adamw_8bit", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
)
NAMES = ["adamw", "adafactor", eight_bit]
SHAPES = {"wide": (64, 128), "small": (4, 6), "bias": (5,)}  # bitsandbytes leaves what is below 4096 in 32 bits


def parameters(seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def move(trained: Parameters, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()


def values(trained: Parameters) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_on_where_it_was(name: str) -> None:
    """By the tensors of a checkpoint, in another optimizer, and after a put-back in the same one."""
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    whole = initial_state(parameters(), config)
    move(whole.parameters, whole.optimizer, range(3))
    groups = {group: {k: v.detach().clone() for k, v in one.items()} for group, one in tensors_of(whole).items()}
    numbers = numbers_of(whole)
    move(whole.parameters, whole.optimizer, range(3, 6))
    wanted, moments = values(whole.parameters), optimizer_tensors(whole.parameters, whole.optimizer)
    again = initial_state(parameters(seed=1), config)
    for state in (again, whole):
        put_back(state, copy.deepcopy(groups), numbers)  # whose tensors become the optimizer's own
        move(state.parameters, state.optimizer, range(3, 6))
        for key, value in values(state.parameters).items():
            assert torch.equal(value, wanted[key]), key
        now = optimizer_tensors(state.parameters, state.optimizer)
        assert now.keys() == moments.keys() and all(torch.equal(now[key], moments[key]) for key in now)


def test_adamw_is_what_it_was() -> None:
    trained, plain = parameters(), parameters()
    move(trained, make_optimizer(trained, OptimConfig(lr=0.01)), range(3))
    move(plain, torch.optim.AdamW(plain.values(), lr=0.01, betas=(0.9, 0.999), weight_decay=0.0), range(3))
    assert all(torch.equal(value, values(plain)[name]) for name, value in values(trained).items())


def test_adafactor_by_hand() -> None:
    """Shazeer and Stern 2018, algorithm 4, of one matrix, in float64."""
    trained = {"wide": nn.Parameter(parameters()["wide"].detach().double())}
    x, rows_, columns = trained["wide"].detach().clone(), torch.zeros(64, 1).double(), torch.zeros(1, 128).double()
    optimizer = make_optimizer(trained, OptimConfig(name="adafactor", lr=0.01, weight_decay=0.1))
    for t in range(1, 4):
        g = torch.randn(64, 128, generator=torch.Generator().manual_seed(t)).double()
        trained["wide"].grad = g.clone()
        optimizer.step()
        beta = 1 - t**-0.8
        alpha = max(1e-3, float(x.norm()) / x.numel() ** 0.5) * min(0.01, t**-0.5)
        x = x * (1 - 0.01 * 0.1)
        rows_ = beta * rows_ + (1 - beta) * (g**2).mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * (g**2).mean(0, keepdim=True)
        update = g / (rows_ @ columns / rows_.mean()).sqrt()
        x = x - alpha * update / max(1.0, float(update.norm()) / update.numel() ** 0.5)
    assert torch.allclose(trained["wide"].detach(), x, rtol=1e-9)


@pytest.mark.parametrize(("name", "most"), [("adamw", 2.001), ("adafactor", 0.01), ("adamw_8bit", 0.52)])
def test_what_it_remembers(name: str, most: float) -> None:
    """In memory of the weights."""
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    trained = {"wide": nn.Parameter(torch.randn(256, 256))}
    optimizer = make_optimizer(trained, OptimConfig(name=name))
    move(trained, optimizer, range(1))
    kept = sum(one.numel() * one.element_size() for one in optimizer_tensors(trained, optimizer).values())
    assert most * 0.5 < kept / (4 * 256 * 256) <= most


def test_8_bits_are_near_32() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = parameters(), parameters()
    before = values(ours)
    move(ours, make_optimizer(ours, OptimConfig(name="adamw_8bit", lr=0.01)), range(20))
    move(theirs, make_optimizer(theirs, OptimConfig(lr=0.01)), range(20))
    moved = values(theirs)["wide"] - before["wide"]
    error = (values(ours)["wide"] - values(theirs)["wide"]).norm() / moved.norm()
    assert 0 < error < 0.1
    assert torch.allclose(values(ours)["small"], values(theirs)["small"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", eight_bit])
def test_a_run_continues_exactly(name: str, settings: list[str], tmp_path: Path) -> None:
    """In another process. Its adapters are large enough that 8 bits are used."""
    settings = [
        *settings,
        f"optim.name={name}",
        "model.lora.rank=300",
        "model.lora.alpha=300",
        "optim.ema=0.9",
        "eval.every=2",
    ]
    whole = train_here(settings, "name=whole")
    assert all(row["grad_norm"] > 0 for row in rows(whole / "metrics.jsonl"))
    run = train_here(settings, "train.steps=2")
    child = command(["train", *settings, "--trust"], tmp_path)
    assert child.wait() == 0, child.err.read_text()
    assert_same_run(run, whole)
    with pytest.raises(UserError, match=r"optim\.name"):
        train_here(settings, "optim.name=adamw", "train.steps=6")


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"optim.betas is \[0.8, 0.99\], but optim.name=adafactor"):
        check(load_config(None, ["optim.name=adafactor", "optim.betas=[0.8,0.99]"]))
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adamw_8bit, which needs bitsandbytes; run: pip install 'draftplus\[quant"):
        make_optimizer(parameters(), OptimConfig(name="adamw_8bit"))
