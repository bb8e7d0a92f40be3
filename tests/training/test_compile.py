"""`train.compile`: the same run but for rounding, compiled before its first step, and nothing else is changed by it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from draftplus.config import Config, LoraConfig
from draftplus.config.schema import OptimConfig, PrefixCacheConfig, TrainConfig
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.models import compiling, lora
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.training import fine_tuning, warm_up
from draftplus.training.ddpo import ddpo_step
from draftplus.training.placement import Replicated
from draftplus.training.reuse import PrefixCache
from draftplus.training.state import initial_state
from draftplus.training.step import Setup, gradient_step
from tests.support.runs import REWARDS, fingerprint, relative, rows, train_here, weights
from tests.support.steps import ANIMALS, BATCH, OBJECTIVES, REUSE, SAMPLERS
from tests.tiny import CPU, SHAPE, normal, problem, tiny_model

COMPILED = "train.compile=true"
RUN = [
    "objective.kl_coeff=0.5", "objective.grad_steps=2", "train.micro_batch_size=2", "train.sampling_batch_size=3",
    "model.gradient_checkpointing=true", "train.steps=2", "checkpoint.every=1", "eval.every=2",
    f"reward={REWARDS}:patient",
]  # fmt: skip
QUICK = ("draft", "gated", "ddpo-updates")


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured and differentiated as ever, but run by torch's own kernels: a C++ compiler takes minutes."""
    limits = {key: getattr(torch._dynamo.config, key) for key in ("recompile_limit", "accumulated_recompile_limit")}
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(limits):
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many graphs there were after each warm-up."""
    found: list[int] = []

    def counting(*given: Any) -> None:
        warm_up.warm_up(*given)
        found.append(number_of_graphs())

    monkeypatch.setattr(fine_tuning, "warm_up", counting)
    return found


def number_of_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def assert_close_runs(run: Path, other: Path, within: float = 1e-5) -> None:
    for file in ("metrics.jsonl", "eval.jsonl"):
        for row, expected in zip(rows(run / file), rows(other / file), strict=True):
            assert row.keys() == expected.keys()
            numbers = {key: value for key, value in expected.items() if isinstance(value, (int, float))}
            assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=within, abs=1e-9)
    made, expected = weights(run / "adapter"), weights(other / "adapter")
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert tensor.stride() == expected[name].stride()
        torch.testing.assert_close(tensor, expected[name], rtol=10 * within, atol=1e-6)


def test_a_run(settings: list[str], graphs: list[int]) -> None:
    """In float32; with gradient in two sampling steps, micro-batches, checkpointing, and the KL term."""
    compiled = train_here(settings, *RUN, COMPILED, "name=compiled")
    assert graphs[0] > 1 and number_of_graphs() - graphs[0] == 0, "something was compiled after the warm-up"
    measured = rows(compiled / "metrics.jsonl")
    assert measured[0]["kl"] == 0 and measured[1]["kl"] > 1e-7, "adapters are switched inside compiled blocks"
    plain = train_here(settings, *RUN)
    assert number_of_graphs() == graphs[0]
    assert_close_runs(compiled, plain)

    # stopped and continued, it is the same to the last bit
    train_here(settings, *RUN, COMPILED, "name=stopped", "train.steps=1")
    stopped = train_here(settings, *RUN, COMPILED, "name=stopped")
    assert fingerprint(stopped) == fingerprint(compiled)
    assert number_of_graphs() == graphs[0], "the same shapes were compiled again"


@pytest.mark.slow
def test_a_whole_denoiser(settings: list[str], graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen copy is compiled too. Its convolutions read channels last; trained weights keep their layout."""
    full = [*RUN, "model.lora=null", "model.gradient_checkpointing=false", "optim.lr=1e-4"]
    seen: list[dict[str, Any]] = []
    compile_blocks = compiling.compile_blocks

    def noting(networks: Any, *given: Any) -> None:
        compile_blocks(networks, *given)
        seen.extend({"network": network} for network in networks)

    monkeypatch.setattr("draftplus.models.stable_diffusion.compile_blocks", noting)
    compiled = train_here(settings, *full, COMPILED, "name=compiled")
    assert number_of_graphs() == graphs[0]
    trained, frozen = (one["network"].down_blocks[0].resnets[0].conv1.weight for one in seen)
    assert trained.is_contiguous() and not frozen.is_contiguous()
    assert frozen.is_contiguous(memory_format=torch.channels_last)
    assert rows(compiled / "metrics.jsonl")[1]["kl"] > 1e-9
    plain = train_here(settings, *full)
    assert_close_runs(compiled, plain, 1e-4)
    assert not any("_orig_mod" in name for name in load_file(compiled / "adapter/diffusion_pytorch_model.safetensors"))


def test_adapters_act_inside_compiled_blocks(tiny_path: Path) -> None:
    """On, off, folded, off while folded, and scaled: each as without compiling."""
    adapters = LoraConfig(rank=2, alpha=4.0)
    plain, compiled = (tiny_model(tiny_path, torch.float32, adapters) for _ in range(2))
    compiled.compile()
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    time = torch.tensor(500)

    def predictions(model: StableDiffusion) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.tuned.trainable().items():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        given = model.encode(["a cat", "a dog"])
        found = {}
        with torch.no_grad():
            found["on"] = model.predict(latents, time, given)
            with model.tuned.reference():
                found["off"] = model.predict(latents, time, given)
            with model.tuned.folded():
                found["folded"] = model.predict(latents, time, given)
                with model.tuned.reference():
                    found["off while folded"] = model.predict(latents, time, given)
            lora.set_scale(model.unet, 0.5)
            found["half"] = model.predict(latents, time, given)
            lora.set_scale(model.unet, 1.0)
            found["on again"] = model.predict(latents, time, given)
        return found

    expected, made = predictions(plain), predictions(compiled)
    assert number_of_graphs() > 1
    for name, prediction in made.items():
        torch.testing.assert_close(prediction, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(made["off"], made["off while folded"]) and torch.equal(made["on"], made["on again"])
    assert min(float((made["on"] - made[name]).abs().max()) for name in ("off", "half")) > 1e-3


def setup_of(name: str, model: StableDiffusion) -> Setup:
    objective, reuse = OBJECTIVES[name], REUSE.get(name, PrefixCacheConfig())
    sizes = TrainConfig(global_batch_size=BATCH, sampling_batch_size=3, prefix_cache=reuse)
    config = Config(objective=objective, optim=OptimConfig(lr=0.01, grad_clip=0.1), train=sizes)
    here = World(0, 1, CPU)
    cache = PrefixCache(reuse.batches) if reuse.uses > 1 else None
    made = problem(model, objective, steps=4, **SAMPLERS.get(name, {}))
    return Setup(config, made, ANIMALS, SHAPE, 2, here, Replicated(here), cache)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in OBJECTIVES]
)
def test_the_warm_up_changes_nothing(name: str, fresh: StableDiffusion) -> None:
    """Steps after it are bit for bit those without it."""
    made: list[Any] = []
    before = {key: tensor.clone() for key, tensor in fresh.unet.state_dict().items()}
    for warms in (False, True):
        fresh.unet.load_state_dict(before)
        setup = setup_of(name, fresh)
        if warms:
            drawn = torch.get_rng_state()
            warm_up.warm_up(setup, range(50))
            assert torch.equal(drawn, torch.get_rng_state())
            assert all(parameter.grad is None for parameter in fresh.tuned.trainable().values())
            assert all(torch.equal(tensor, before[key]) for key, tensor in fresh.unet.state_dict().items())
        state = initial_state(fresh.tuned.trainable(), setup.config.optim)
        step = ddpo_step if name.startswith("ddpo") else gradient_step
        made.append((step(setup, state, nullcontext), copy.deepcopy(fresh.unet.state_dict())))
    (metrics, weights), (others, moved) = made
    assert metrics == others and all(torch.equal(weights[key], moved[key]) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_warm_up_compiles_all_that_steps_need(
    name: str, fresh: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # which captures the same graphs, in a fraction of the time
    fresh.compile()
    setup = setup_of(name, fresh)
    warm_up.warm_up(setup, range(50))
    graphs = number_of_graphs()
    assert graphs > 1
    state = initial_state(fresh.tuned.trainable(), setup.config.optim)
    for _ in range(6):
        (ddpo_step if name.startswith("ddpo") else gradient_step)(setup, state, nullcontext)
        state.step += 1
    assert number_of_graphs() == graphs


def test_evaluation_is_not_compiled(tiny_path: Path) -> None:
    model = tiny_model(tiny_path, torch.float32)
    model.compile()
    compiled = number_of_graphs()
    with warm_up.eagerly(True), torch.no_grad():
        model.predict(torch.zeros(1, *SHAPE), torch.tensor(1), model.encode(["a cat"]))
    assert number_of_graphs() == compiled


def test_without_a_compiler(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    missing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}  # else one found before is used
    refusal = r"train\.compile is true, .* device 'cpu'.* C\+\+ compiler .*train\.compile=f"
    with config.patch(missing), pytest.raises(UserError, match=refusal):
        train_here(settings, COMPILED)


def test_a_block_that_cannot_be_compiled(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    forward = BasicTransformerBlock.forward

    def breaking(block: Any, hidden: torch.Tensor, *given: Any, **keywords: Any) -> Any:
        print(float(hidden.sum()))
        return forward(block, hidden, *given, **keywords)

    monkeypatch.setattr(BasicTransformerBlock, "forward", breaking)
    with pytest.raises(UserError, match=r"the denoiser cannot be compiled: .*; set train\.compile=false"):
        train_here(settings, COMPILED)


def test_a_block_by_the_compiler_itself(tiny_path: Path) -> None:
    model = tiny_model(tiny_path, torch.float32)
    block = compiling.blocks(model.unet)[0]
    width, words = block.attn1.to_q.in_features, block.attn2.to_k.in_features
    given = [normal(2, 16, width).float(), normal(2, 5, words, seed=1).float()]

    def passed() -> list[torch.Tensor]:
        hidden = given[0].clone().requires_grad_()
        made = block(hidden, encoder_hidden_states=given[1])
        return [made.detach(), *torch.autograd.grad(made.square().sum(), hidden)]

    eager = passed()
    block.compile(dynamic=False, fullgraph=True, backend="inductor")
    for one, expected in zip(passed(), eager, strict=True):
        assert relative(one, expected) < 1e-5
    assert number_of_graphs() == 1


@pytest.mark.skipif("DRAFTPLUS_INDUCTOR" not in os.environ, reason="takes ten minutes; set DRAFTPLUS_INDUCTOR=1")
def test_a_run_by_the_compiler_itself(settings: list[str], monkeypatch: pytest.MonkeyPatch, graphs: list[int]) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    compiled = train_here(settings, *RUN, COMPILED, "name=compiled")
    assert number_of_graphs() == graphs[0]
    assert_close_runs(compiled, train_here(settings, *RUN), 3e-4)
