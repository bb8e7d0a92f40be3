"""Our sampler and decoding against the stock Stable Diffusion pipeline, on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from draftplus import rng
from draftplus.config import SamplerConfig
from draftplus.diffusion.guidance import classifier_free, denoiser
from draftplus.diffusion.sampler import Rollout, Sampler, sample
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver
from draftplus.evaluation.generate import Job, Knobs, decoded, sampled_latents
from draftplus.models.scheduler_file import SCHEDULERS
from draftplus.models.stable_diffusion import StableDiffusion
from draftplus.types import Conditioning
from tests.tiny import PROMPTS, SCHEDULER, SHAPE, normal, randomize, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*", "ignore::FutureWarning")
SEEDS = [3, 14, 15]
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def ours(
    made: StableDiffusion, scheduler: dict[str, Any], steps: int, guidance_scale: float = 4.0, negative: str = "",
    solver: str = "auto", eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Latents (3, c, h, w) of PROMPTS and SEEDS."""
    schedule, name = make_schedule(scheduler, steps, solver)
    sampler = Sampler(made, schedule, make_solver(name, eta), guidance_scale, negative)
    dtype = made.unet.conv_in.weight.dtype
    start = Rollout(rng.stock_noise(SHAPE, SEEDS).to(dtype))
    # a stock pipeline that is given latents draws its steps' noise from the generators' beginning
    draws = [[torch.randn(1, *SHAPE, generator=g, dtype=dtype) for _ in range(steps)] for g in generators()]
    with torch.no_grad():
        noise = [torch.cat([draw[i] for draw in draws]) for i in range(steps)]
        return sampler.sample(made.encode(PROMPTS), start, noise=noise.__getitem__).latents


def generators() -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in SEEDS]


def stock(
    directory: Path, scheduler: Any, steps: int, guidance_scale: float = 4.0, negative: str = "", eta: float = 0.0,
    output: str = "latent", dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    pipe = stock_pipeline(directory, dtype, scheduler)
    return pipe(
        PROMPTS, latents=rng.stock_noise(SHAPE, SEEDS).to(dtype), num_inference_steps=steps, eta=eta,
        guidance_scale=guidance_scale, negative_prompt=[negative] * 3, generator=generators(), output_type=output,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "steps", "sampling"),
    [
        ({}, 10, {}),
        ({}, 7, {"guidance_scale": 1.0}),
        ({"timestep_spacing": "trailing"}, 7, {"negative": "a shark"}),
        ({"set_alpha_to_one": True, "steps_offset": 0}, 3, {}),
        ({"prediction_type": "v_prediction"}, 6, {}),
        (ZERO_SNR, 6, {}),
        ({}, 6, {"eta": 0.8}),
        ({"timestep_spacing": "trailing"}, 6, {"eta": 1.0, "guidance_scale": 1.0}),
    ],
    ids=str,
)
def test_ddim(tiny_path: Path, settings: dict[str, Any], steps: int, sampling: dict[str, Any]) -> None:
    config = {**SCHEDULER, **settings}
    expected = stock(tiny_path, DDIMScheduler(**config), steps, **sampling)
    found = ours(tiny_model(tiny_path, trainable=False), config, steps, **sampling)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "steps", "sampling"),
    [
        ({}, 6, {}),
        ({}, 16, {"guidance_scale": 1.0}),
        ({"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}, 6, {"negative": "a shark"}),
        ({"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}, 16, {}),
    ],
    ids=str,
)
def test_dpm_solver(tiny_path: Path, settings: dict[str, Any], steps: int, sampling: dict[str, Any]) -> None:
    config = {**SCHEDULER, **settings}
    scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    expected = stock(tiny_path, scheduler, steps, **sampling)
    found = ours(tiny_model(tiny_path, trainable=False), config, steps, solver="dpmpp_2m", **sampling)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_decoded_picture(tiny_path: Path, dtype: torch.dtype) -> None:
    made = tiny_model(tiny_path, dtype=dtype, trainable=False)
    latents = ours(made, SCHEDULER, 6)
    with torch.no_grad():
        found = made.decode(latents)
    expected = stock(tiny_path, DDIMScheduler(**SCHEDULER), 6, output="pt", dtype=dtype)
    assert found.dtype == dtype and found.shape == expected.shape == (3, 3, 16, 16)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_seeds_repeat_in_a_stock_pipeline(tiny_path: Path) -> None:
    """No latents given: stock draws them from its generators, as `stock_noise` does."""
    pipe = stock_pipeline(tiny_path, torch.float32)
    expected = pipe(
        PROMPTS, num_inference_steps=5, guidance_scale=4.0, generator=generators(), output_type="latent"
    ).images
    found = ours(tiny_model(tiny_path, dtype=torch.float32, trainable=False), SCHEDULER, 5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_seeds_noise_is_what_stock_draws_in_half_precision(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """To the last bit, as the denoiser of either sees it first."""
    pipe, made = stock_pipeline(tiny_path, dtype), tiny_model(tiny_path, dtype=dtype, trainable=False)
    seen: list[Tensor] = []

    def stop(_: Any, latents: Tensor, *rest: Any, **more: Any) -> None:
        seen.append(latents)
        raise LookupError

    pipe.scheduler = DDIMScheduler(**SCHEDULER)
    monkeypatch.setattr(type(pipe.unet), "forward", stop)
    shape = {"height": 24, "width": 8}
    with pytest.raises(LookupError):
        pipe(PROMPTS, num_inference_steps=2, guidance_scale=1.0, generator=generators(), **shape)
    monkeypatch.setattr(type(made), "predict", stop)
    config = SamplerConfig(steps=2, guidance_scale=1.0, negative_prompt="", **shape)
    jobs = [Job(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    with pytest.raises(LookupError):
        list(sampled_latents(made, jobs, config, 3))
    assert seen[0].dtype == seen[1].dtype == dtype
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1].float(), rng.stock_noise((4, 12, 4), SEEDS)) is (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("ddim", {}),
        ("ddim", {"eta": 0.8}),
        ("ddim", {"spacing": "trailing", "guidance_scale": 1.0}),
        ("euler", {"negative_prompt": "a shark"}),
        ("dpmpp_2m", {"spacing": "leading"}),
    ],
    ids=str,
)
def test_half_precision_is_rounded_as_stock_rounds(
    tiny_path: Path, solver: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every step, to the last bit."""
    made = tiny_model(tiny_path, dtype=dtype, trainable=False)
    config = SamplerConfig(**{"solver": solver, "steps": 5, "guidance_scale": 4.0, "negative_prompt": "", **settings})
    jobs = [Job(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    [(_, found)] = sampled_latents(made, jobs, config, 3)
    name, changes, _ = SCHEDULERS[solver]
    respaced = {"timestep_spacing": config.spacing} if config.spacing else {}
    pipe = stock_pipeline(tiny_path, dtype, getattr(diffusers, name).from_config({**SCHEDULER, **changes, **respaced}))
    expected = pipe(
        PROMPTS, num_inference_steps=5, eta=config.eta, guidance_scale=config.guidance_scale, output_type="latent",
        negative_prompt=[config.negative_prompt] * 3, generator=generators(),
    ).images  # fmt: skip
    assert found.dtype == dtype and torch.equal(found, expected)
    if dtype == torch.bfloat16:  # in float16 ours decodes in float32, where this autoencoder says that it overflows
        drawn = pipe.image_processor.postprocess(pipe.vae.decode(expected / pipe.vae.config.scaling_factor)[0], "pt")
        assert torch.equal(decoded(made, found.float(), 3), drawn.float())


def test_a_blend_of_two_models_is_not_rounded(tiny_path: Path) -> None:
    """No stock pipeline draws it, and the two ends of annealed guidance are drawn as they are without it."""
    made = tiny_model(tiny_path, dtype=torch.bfloat16)
    randomize(made)
    config = SamplerConfig(steps=4, guidance_scale=4.0, negative_prompt="")
    drawn = {
        anneal: next(sampled_latents(made, [Job("a cat", 1)], config, 1, Knobs(anneal=anneal)))[1]
        for anneal in ("tuned", "base", "linear", None)
    }
    assert drawn["linear"].dtype == torch.float32 and drawn["base"].dtype == torch.bfloat16
    assert torch.equal(drawn["tuned"], drawn[None]) and not torch.equal(drawn["base"], drawn[None])


def test_a_fresh_adapter_changes_no_picture(tiny_path: Path) -> None:
    plain = ours(tiny_model(tiny_path, trainable=False), SCHEDULER, 4)
    assert torch.equal(ours(tiny_model(tiny_path), SCHEDULER, 4), plain)
    tuned = tiny_model(tiny_path)
    randomize(tuned)
    assert (ours(tuned, SCHEDULER, 4) - plain).abs().max() > 0.01
    with tuned.tuned.reference():
        assert torch.equal(ours(tuned, SCHEDULER, 4), plain)


class Velocity:
    """A flow-matching model of a few numbers."""

    mix = normal(4, 4, seed=9)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.hidden.mean(1)[:, :4, None, None]
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix, latents) + text + torch.sin(timestep / 300))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_guided_flow_matching(shift: float, guidance_scale: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(9)
    made, given, without = Velocity(), Conditioning(normal(2, 5, 4, seed=1)), Conditioning(normal(1, 5, 4, seed=2))
    x = start = normal(2, *SHAPE, seed=3)
    for t in scheduler.timesteps:
        c, u = made.predict(x, t, given), made.predict(x, t, without)
        x = scheduler.step(c if guidance_scale == 1 else u + guidance_scale * (c - u), t, x).prev_sample
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    schedule, name = make_schedule(config, 9)
    denoise = denoiser(classifier_free(made.predict, given, without, guidance_scale), schedule)
    found = sample(denoise, Rollout(start), schedule, make_solver(name)).latents
    torch.testing.assert_close(found, x.double(), atol=1e-4, rtol=0)
