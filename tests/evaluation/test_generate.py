"""Pictures by seed equal a stock pipeline's, with the adapter, between base and tuned, and from the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from draftplus import api, cli
from draftplus.errors import UserError
from draftplus.evaluation.pictures import to_pil
from tests.support import rewards
from tests.support.runs import REWARDS, small_settings, train_here
from tests.tiny import stock_pipeline

PROMPTS = ["a cat", "a dog on a blue background"]
SEEDS = [3, 0, 11]
STEPS, SCALE = 4, 3.0
SAMPLER = [f"sampler.steps={STEPS}", f"sampler.guidance_scale={SCALE}", "device=cpu"]


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned until its pictures are others; evaluated, and so with adapters, at 0, 2 and 4."""
    settings = small_settings(small, tmp_path_factory.mktemp("tuned"))
    return train_here(settings, "eval.every=2", "optim.lr=0.1", "model.lora.alpha=8", *SAMPLER[:2])


@pytest.fixture(scope="module")
def full(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fully tuned."""
    settings = small_settings(small, tmp_path_factory.mktemp("full"))
    return train_here(settings, "model.lora=null", "train.steps=2", "optim.lr=0.02", *SAMPLER[:2])


def stock(pipe: Any, eta: float = 0.0, steps: int = STEPS, **settings: Any) -> Tensor:
    """The stock pipeline's pictures (n, 3, H, W), one generator for each."""
    made = []
    for prompt in PROMPTS:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]
        made.append(
            pipe(
                [prompt] * len(SEEDS), generator=generators, num_inference_steps=steps, guidance_scale=SCALE, eta=eta,
                output_type="pt", **settings,
            ).images
        )  # fmt: skip
    return torch.cat(made)


def ours(target: Any, *more: str, **settings: Any) -> Tensor:
    return api.generate(str(target), PROMPTS, SEEDS, [*SAMPLER, *more], **settings)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_seeds_are_those_of_a_stock_pipeline(small: Path, eta: float) -> None:
    expected = stock(stock_pipeline(small, torch.float32), eta)
    assert far(ours(small, f"sampler.eta={eta}"), expected) < 1e-3
    assert far(expected[0], expected[1]) > 1e-2, "seeds that do not matter"
    assert far(expected[0], expected[len(SEEDS)]) > 1e-3, "prompts that do not matter"


@pytest.mark.slow
def test_negative_prompt_and_size(small: Path) -> None:
    more = ["sampler.negative_prompt=a dog", "sampler.height=40", "sampler.width=48"]
    expected = stock(stock_pipeline(small, torch.float32), negative_prompt=["a dog"] * len(SEEDS), height=40, width=48)
    made = ours(small, *more)
    assert made.shape == (6, 3, 40, 48)
    assert far(made, expected) < 1e-3


@pytest.mark.slow
def test_batches_change_nothing(small: Path) -> None:
    assert far(ours(small, "train.sampling_batch_size=1"), ours(small, "train.sampling_batch_size=5")) < 1e-4


@pytest.mark.slow
def test_the_adapter_in_a_stock_pipeline(small: Path, run: Path) -> None:
    pipe = stock_pipeline(small, torch.float32)
    base = stock(pipe)
    pipe.load_lora_weights(run / "adapter")
    expected = stock(pipe)
    assert far(ours(run), expected) < 1e-3
    assert far(expected, base) > 1e-2
    assert far(ours(small, adapter=run / "adapter"), expected) < 1e-3


@pytest.mark.slow
def test_the_full_denoiser_in_a_stock_pipeline(small: Path, full: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipe = stock_pipeline(small, torch.float32)
    base = stock(pipe)
    pipe.unet = UNet2DConditionModel.from_pretrained(full / "adapter")
    assert far(ours(full), stock(pipe)) < 1e-3
    assert far(ours(full), base) > 1e-2


@pytest.mark.slow
def test_steps_and_best(small: Path, run: Path) -> None:
    assert far(ours(f"{run}@4"), ours(run)) == 0
    assert far(ours(f"{run}@0"), ours(small)) < 1e-5
    assert far(ours(f"{run}@2"), ours(run)) > 1e-3
    best = json.loads((run / "best.json").read_text())["step"]
    assert far(ours(f"{run}@best"), ours(f"{run}@{best}")) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [("@3", "no adapter of step 3; its steps are 0, 2, 4"), ("@latest", "a step or best"), ("@", "a step or best")],
)
def test_steps_that_are_not_there(run: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(f"{run}{target}")


def test_a_step_of_what_is_no_run(small: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        ours(f"{small}@best")


@pytest.mark.slow
def test_the_scale_runs_from_base_to_tuned(small: Path, run: Path) -> None:
    base, half, tuned = (ours(run, lora_scale=scale) for scale in (0.0, 0.5, 1.0))
    assert torch.equal(base, ours(small))
    assert torch.equal(tuned, ours(run))
    assert min(far(half, base), far(half, tuned)) > 1e-3


@pytest.mark.slow
def test_a_scale_between_is_a_stock_pipelines(small: Path, run: Path) -> None:
    pipe = stock_pipeline(small, torch.float32)
    pipe.load_lora_weights(run / "adapter")
    assert far(ours(run, lora_scale=0.5), stock(pipe, cross_attention_kwargs={"scale": 0.5})) < 1e-3


SHARES: dict[str, Callable[[float], float]] = {
    "linear": lambda f: f,
    "power:2": lambda f: f**2,
    "step:0.5": lambda f: float(f >= 0.5),
    "base": lambda f: 0.0,
    "tuned": lambda f: 1.0,
}


@torch.no_grad()
def blended(base: Any, tuned: Any, share: Callable[[float], float]) -> Tensor:
    """Annealed importance guidance by hand, with two separate pipelines and the stock scheduler."""
    pictures = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            x = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(seed))
            text = base.encode_prompt([prompt], "cpu", 1, True)
            base.scheduler.set_timesteps(STEPS)
            for i, t in enumerate(base.scheduler.timesteps):
                predictions = []
                for pipe in (base, tuned):
                    given, without = (pipe.unet(x, t, encoder_hidden_states=one).sample for one in text)
                    predictions.append(without + SCALE * (given - without))
                w = share(i / STEPS)
                x = base.scheduler.step((1 - w) * predictions[0] + w * predictions[1], t, x).prev_sample
            image = base.vae.decode(x / base.vae.config.scaling_factor).sample
            pictures.append((image / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)


@pytest.mark.slow
@pytest.mark.parametrize("anneal", SHARES)
def test_annealing_is_its_formula(small: Path, run: Path, anneal: str) -> None:
    base, tuned = (stock_pipeline(small, torch.float32) for _ in range(2))
    tuned.load_lora_weights(run / "adapter")
    expected = blended(base, tuned, SHARES[anneal])
    made = ours(run, anneal=anneal)
    assert far(made, expected) < 1e-3
    if anneal in ("base", "tuned"):
        assert torch.equal(made, ours(small) if anneal == "base" else ours(run))
    else:
        assert min(far(made, ours(small)), far(made, ours(run))) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_ends_of_annealing_are_the_two_models_bit_for_bit(
    small: Path, request: pytest.FixtureRequest, kind: str, eta: float
) -> None:
    """As a user makes them: the tuned model with its adapter folded, the base model without any adapter."""
    tuned = request.getfixturevalue("run" if kind == "lora" else "full")
    more = f"sampler.eta={eta}"
    assert torch.equal(ours(tuned, more, anneal="step:0"), ours(tuned, more))
    assert torch.equal(ours(tuned, more, anneal="step:1"), ours(small, more))
    assert far(ours(tuned, more), ours(small, more)) > 1e-3


def test_between_its_ends_every_step_is_of_one_of_the_models(small: Path, run: Path) -> None:
    """`step:f` up to the last step: the base model's trajectory, bit for bit, and then one step of the tuned one."""
    late = ours(run, anneal=f"step:{(STEPS - 1) / STEPS}")
    assert not torch.equal(late, ours(small)) and not torch.equal(late, ours(run))
    assert torch.equal(ours(run, anneal=f"step:{(STEPS - 1) / STEPS + 0.01}"), ours(small))


@pytest.mark.parametrize("scale", ["nan", "inf"])
def test_scales_that_are_none(run: Path, scale: str) -> None:
    with pytest.raises(UserError, match=f"lora_scale is {scale}"):
        ours(run, lora_scale=float(scale))


@pytest.mark.slow
def test_annealing_of_a_full_denoiser(small: Path, full: Path) -> None:
    from diffusers import UNet2DConditionModel

    base, tuned = (stock_pipeline(small, torch.float32) for _ in range(2))
    tuned.unet = UNet2DConditionModel.from_pretrained(full / "adapter")
    expected = blended(base, tuned, SHARES["linear"])
    assert far(ours(full, anneal="linear"), expected) < 1e-3
    assert far(expected, ours(full)) > 1e-3


@pytest.mark.slow
def test_a_full_denoiser_has_no_scale(full: Path) -> None:
    with pytest.raises(UserError, match="fully fine-tuned"):
        ours(full, lora_scale=0.5)


@pytest.mark.parametrize("settings", [{"anneal": "linear"}, {"lora_scale": 0.5}])
def test_nothing_to_scale_or_anneal(small: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no trained weights"):
        ours(small, **settings)


@pytest.mark.parametrize("anneal", ["quadratic", "power", "power:x", "power:-1", "step:2", "linear:3", ""])
def test_schedules_that_are_none(run: Path, anneal: str) -> None:
    with pytest.raises(UserError, match=r"--anneal|anneal '"):
        ours(run, anneal=anneal)


def run_command(*arguments: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sys.argv", ["draftplus", *arguments])
    cli.main()


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n{PROMPTS[0]}\n")
    run_command(
        "generate", f"{run}@2", *SAMPLER, "--prompt", PROMPTS[0], "--prompts", str(prompts), "--seeds", "3,0,11",
        "--lora-scale", "0.5", "--reward", f"{REWARDS}:by_prompt", "--reward", f"{REWARDS}:redness", "-o",
        str(tmp_path / "out"), patch=monkeypatch,
    )  # fmt: skip
    expected = ours(f"{run}@2", lora_scale=0.5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [(p, s) for p in PROMPTS for s in SEEDS]
    told = [prompt for prompt in PROMPTS for _ in SEEDS]
    for name in ("by_prompt", "redness"):
        scores = getattr(rewards, name)(expected, told).tolist()
        assert [line[f"reward/{REWARDS}:{name}"] for line in lines] == pytest.approx(scores, abs=1e-3)
    for line, image in zip(lines, expected, strict=True):
        saved = numpy.asarray(Image.open(tmp_path / "out" / line["file"]))
        assert numpy.array_equal(saved, numpy.asarray(to_pil(image)))
    assert (tmp_path / "out" / "grid.png").is_file()
    printed = capsys.readouterr()
    assert "by_prompt: mean" in printed.out and str(tmp_path / "out") in printed.out
    assert printed.err == ""
