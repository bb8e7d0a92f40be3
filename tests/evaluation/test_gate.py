"""A gate goes with the weights: whatever samples them lets the frozen model draw the first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftplus import api, rng
from draftplus.build import build_model, build_problem, build_rewards, build_sampler
from draftplus.config import load_config, trusting
from draftplus.diffusion.objectives import loss, plan, prefix
from draftplus.diffusion.sampler import sample
from draftplus.errors import UserError
from draftplus.evaluation.evaluate import latents_directory
from draftplus.evaluation.generate import TUNED
from draftplus.evaluation.targets import find_targets
from draftplus.models import tuned as weights_of
from draftplus.models.lora_files import LORA_FILE
from draftplus.models.tuned import DENOISER_INDEX, GATE, gate_of
from tests.support.runs import rows, small_settings, train_here
from tests.tiny import CPU

pytestmark = pytest.mark.slow

STEPS, GATED = 4, 2
PROMPT, SEEDS = "a cat", [3, 0]
SAMPLER = [f"sampler.steps={STEPS}", "sampler.guidance_scale=3", "device=cpu"]
TRAINED = ["objective.gate=0.5", "objective.grad_steps=all", "train.steps=2", "eval.every=1"]


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings(small, tmp_path_factory.mktemp("gated"))
    return train_here(settings, "optim.lr=0.1", "model.lora.alpha=8", *TRAINED, *SAMPLER)


@pytest.fixture(scope="module")
def full(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = small_settings(small, tmp_path_factory.mktemp("full"))
    return train_here(settings, "optim.lr=0.02", "model.lora=null", *TRAINED, *SAMPLER)


@pytest.fixture(scope="module")
def plain(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter without a gate."""
    file = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_file(load_file(run / "adapter" / LORA_FILE), file, metadata={"format": "pt"})
    return file


def ours(target: Any, *more: str, **settings: Any) -> Tensor:
    return api.generate(str(target), [PROMPT], SEEDS, [*SAMPLER, *more], **settings)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def by_hand(small: Path, adapter: Path) -> Tensor:
    """Two models, each with its own steps."""
    frozen, tuned = (api.load_model(str(small), "cpu", one) for one in (None, adapter))
    assert (frozen.tuned.gate, tuned.tuned.gate) == (0, 0.5)
    tuned.tuned.gate = 0.0
    config = load_config(None, [f"model.path={small}", *SAMPLER]).sampler
    first, last = (build_sampler(model, config) for model in (frozen, tuned))
    noise = rng.stock_noise((4, 8, 8), SEEDS, torch.float32, 0)
    given = [model.encode([PROMPT] * len(SEEDS)) for model in (frozen, tuned)]
    where = first.sample(given[0], first.start(noise), end=GATED)
    where = sample(last.denoiser(given[1]), where, last.schedule, last.solver, begin=GATED)
    return tuned.decode(where.latents)


def test_generate_draws_what_was_trained(run: Path, small: Path) -> None:
    made, hand = ours(run), by_hand(small, run / "adapter")
    assert far(made, hand) < 1e-4
    assert far(made, ours(small)) > 1e-2 and far(made, ours(run, anneal="tuned")) > 1e-2
    for adapter in (run / "adapter", run / "adapter" / LORA_FILE):
        assert torch.equal(ours(small, adapter=adapter), made)
    assert far(ours(f"{run}@1"), by_hand(small, run / "adapters" / "step-000001")) < 1e-4


def test_it_is_the_trajectory_of_training(run: Path) -> None:
    with trusting(True):
        config = load_config(run / "config.yaml")
    model = build_model(config.model, CPU)
    problem = build_problem(config, model, build_rewards(config.reward, CPU))
    model.tuned.load(run / "adapter")
    planned, given = plan(problem.objective, problem.sampler.schedule, 0, 0), model.encode([PROMPT] * len(SEEDS))
    assert planned.window.steps == (2, 3)

    def noise(stream: str, draw: int) -> Tensor:
        assert stream == "x_T"
        return rng.stock_noise((4, 8, 8), SEEDS, torch.float32, 0)

    with model.tuned.folded():
        start = prefix(problem, given, noise, planned)
    images = loss(problem, start, planned, given, [PROMPT] * len(SEEDS), noise).images
    assert far(images, ours(run)) < 1e-4


def test_the_knobs(run: Path, small: Path, plain: Path) -> None:
    assert torch.equal(ours(run, anneal="tuned"), ours(small, adapter=plain))
    assert torch.equal(ours(run, lora_scale=0), ours(small)) and torch.equal(ours(run, anneal="base"), ours(small))
    same = ours(small, adapter=plain, anneal="step:0.5")
    assert far(ours(run), same) < 1e-4 and far(ours(run, anneal="step:0.5"), same) < 1e-4
    assert far(ours(run, anneal="step:0.25"), same) > 1e-2
    half = ours(run, lora_scale=0.5)
    assert far(half, ours(small, adapter=plain, anneal="step:0.5", lora_scale=0.5)) < 1e-4
    assert far(half, ours(run)) > 1e-2 and far(half, ours(small)) > 1e-2


def test_it_is_a_fraction_of_whatever_steps_there_are(run: Path, small: Path, plain: Path) -> None:
    for steps in (1, 2, 6):
        more = f"sampler.steps={steps}"
        gate = "tuned" if steps == 1 else "step:0.5"
        assert far(ours(run, more), ours(small, more, adapter=plain, anneal=gate)) < 1e-4


def test_it_cannot_be_set_beside_the_weights(run: Path, small: Path) -> None:
    for target in (run, small):
        with pytest.raises(UserError, match=r"objective\.gate is set in training.*--anneal tuned for no gate"):
            ours(target, "objective.gate=0")


def test_half_precision_follows_it(run: Path, small: Path) -> None:
    made, wide, without = ours(run, "model.dtype=bfloat16"), ours(run), ours(run, anneal="tuned")
    assert (made - wide).abs().mean() < 0.1 * (wide - without).abs().mean()


def test_a_full_denoiser_in_several_files(
    full: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = by_hand(small, full / "adapter")
    assert far(ours(full), hand) < 1e-4 and far(ours(full, anneal="tuned"), hand) > 1e-2
    monkeypatch.setattr(weights_of, "LARGEST_FILE", "100KB")
    model = api.load_model(str(small), "cpu", full / "adapter")
    model.tuned.save(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert (
        gate_of(tmp_path / "parts" / DENOISER_INDEX) == 0.5 == gate_of(next((full / "adapter").glob("*.safetensors")))
    )
    assert torch.equal(ours(small, adapter=tmp_path / "parts"), ours(full))


def test_the_last_adapter_that_was_loaded_decides(run: Path, small: Path, plain: Path) -> None:
    model = api.load_model(str(small), "cpu", run / "adapter")
    model.tuned.load(plain)
    assert model.tuned.gate == 0
    model.tuned.load(run / "adapter")
    assert model.tuned.gate == 0.5


@pytest.mark.parametrize("told", ["half", "1", "-0.1", "nan"])
def test_a_header_that_names_no_gate(small: Path, plain: Path, tmp_path: Path, told: str) -> None:
    save_file(load_file(plain), tmp_path / "odd.safetensors", metadata={GATE: told})
    with pytest.raises(UserError, match=rf"odd\.safetensors: draftplus\.gate in its header is '{told}'; it must be"):
        ours(small, adapter=tmp_path / "odd.safetensors")


def test_other_programs_pass_over_the_header(run: Path) -> None:
    from diffusers import StableDiffusionPipeline

    with safe_open(run / "adapter" / LORA_FILE, "pt") as opened:
        assert opened.metadata() == {"format": "pt", GATE: "0.5"}
    state, alphas, told = StableDiffusionPipeline.lora_state_dict(run / "adapter", return_lora_metadata=True)
    assert state and not alphas and told is None


def test_evaluation_keeps_gated_and_ungated_apart(
    run: Path, plain: Path, small: Path, tmp_path: Path, made_images: list[int]
) -> None:
    base = api.load_model(str(small), "cpu")
    names = [str(run), f"{run}@1", str(run / "adapters" / "step-000001"), str(run / "adapter" / LORA_FILE), str(plain)]
    targets = find_targets(names, SAMPLER, TUNED)
    kept = {target.name: latents_directory(tmp_path / "latents", target) for target in targets}
    assert kept[str(run)] != kept[str(plain)] != kept[names[3]] and kept[names[1]] == kept[names[2]]
    told = api.evaluate(names, SAMPLER, [PROMPT], seeds=SEEDS, metrics="lpips", output=tmp_path)
    shown = {one["target"]: one for one in told["targets"]}
    assert shown[names[0]]["metrics"] == shown[names[3]]["metrics"] != shown[str(plain)]["metrics"]
    for name, made in ((str(run), ours(run)), (str(plain), ours(run, anneal="tuned"))):
        latents = {k: v for file in kept[name].glob("*.safetensors") for k, v in load_file(file).items()}
        with torch.no_grad():
            found = base.decode(torch.stack([latents[f"{seed} {PROMPT}"] for seed in SEEDS]))
        assert far(found, made) < 1e-4
    made_images.clear()
    api.evaluate([str(run)], SAMPLER, [PROMPT], seeds=SEEDS, metrics="lpips", output=tmp_path, anneal="tuned")
    assert made_images == [len(SEEDS)], "the gated pictures stood in for those without a gate"


@pytest.fixture
def made_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the sampler was asked for."""
    from draftplus.evaluation import latents as store

    counts: list[int] = []
    real = store.sampled_latents

    def counted(model: Any, jobs: Any, *rest: Any) -> Any:
        counts.append(len(jobs))
        return real(model, jobs, *rest)

    monkeypatch.setattr(store, "sampled_latents", counted)
    return counts


def test_evaluation_repeats_that_of_training(run: Path, tmp_path: Path) -> None:
    told = api.evaluate([str(run)], output=tmp_path, metrics="lpips")["targets"]
    last = rows(run / "eval.jsonl")[-1]
    assert told[-1]["metrics"]["lpips"]["mean"] == pytest.approx(last["lpips"], rel=1e-4)
    assert rows(run / "eval.jsonl")[0]["lpips"] == pytest.approx(told[0]["metrics"]["lpips"]["mean"], rel=1e-4)
