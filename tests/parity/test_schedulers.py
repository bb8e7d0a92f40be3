"""The sampler against stock diffusers' schedulers, over many of their settings, with a toy denoiser."""

from __future__ import annotations

from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from draftplus.diffusion.levels import linear
from draftplus.diffusion.schedule import alphas_cumprod, make_schedule
from draftplus.diffusion.solvers import make_solver
from draftplus.errors import UserError, notice
from tests.support.schedulers import assert_close, ours, stock, stock_to_the_next_timestep
from tests.tiny import SCHEDULER

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 15, 30, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"steps_offset": 0},
        {"set_alpha_to_one": True},
        {"prediction_type": "v_prediction", "steps_offset": 0, "set_alpha_to_one": True},
        {"prediction_type": "sample"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"num_train_timesteps": 500},
        ZERO_SNR,
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()) or "as-stable-diffusion",
)
def test_ddim(settings: dict[str, Any], spacing: str, steps: int) -> None:
    config = {**SCHEDULER, **settings, "timestep_spacing": spacing}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    # with linspace stock's stride is not the distance of its timesteps
    expected = (stock_to_the_next_timestep if spacing == "linspace" else stock)(scheduler)
    found = ours(config, steps, "auto")
    # near the smallest signal x0 = (x - sigma eps) / alpha multiplies the rounding of the stock float32 tables
    torch.testing.assert_close(found, expected.double(), atol=1e-4 * max(1.0, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("n", [1000, 250])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("cls", "solver"), [(DDIMScheduler, "ddim"), (DPMSolverMultistepScheduler, "dpmpp_2m")])
def test_timesteps_of_every_number_of_steps(cls: Any, solver: str, spacing: str, n: int) -> None:
    config = {"num_train_timesteps": n, "clip_sample": False, "timestep_spacing": spacing}
    scheduler = cls.from_config(config)
    compared = 0
    for steps in range(1, 121):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        if len(expected) != steps or len(set(expected)) != steps:
            continue  # stock takes a step too many for some numbers, and drops doubled ones
        schedule, _ = make_schedule(config, steps, solver)
        assert [step.timestep for step in schedule.steps] == expected, steps
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing_of_the_configuration_overrides_the_models(spacing: str) -> None:
    scheduler = DDIMScheduler(**{**SCHEDULER, "timestep_spacing": spacing})
    scheduler.set_timesteps(12)
    expected = (stock_to_the_next_timestep if spacing == "linspace" else stock)(scheduler)
    assert_close(ours(SCHEDULER, 12, "ddim", spacing=spacing), expected)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_the_stride_of_stock_is_the_next_timestep_but_for_linspace(spacing: str, steps: int) -> None:
    """So that the judge of linspace is, where stock is right, stock itself; and stock is wrong where we differ."""
    scheduler = DDIMScheduler(**{**SCHEDULER, "timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    plain = stock(scheduler)
    assert torch.equal(stock_to_the_next_timestep(scheduler), plain)
    assert torch.equal(ours(SCHEDULER, steps, "ddim", spacing=spacing), ours(SCHEDULER, steps, "auto", spacing=spacing))
    wrong = DDIMScheduler(**{**SCHEDULER, "timestep_spacing": "linspace"})
    wrong.set_timesteps(steps)
    assert (stock(wrong) - ours(SCHEDULER, steps, "ddim", spacing="linspace")).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}, ZERO_SNR])
def test_ddim_with_noise(settings: dict[str, Any], eta: float, steps: int) -> None:
    if settings is ZERO_SNR and eta == 1:
        eta = 0.9  # at 1 stock takes the root of a rounding error below 0
    config = {**SCHEDULER, **settings}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    expected = stock(scheduler, eta=eta)
    assert (expected - ours(config, steps, "ddim")).abs().max() > 0.01 or steps == 1
    assert_close(ours(config, steps, "ddim", eta), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 14, 15, 16, 25])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dpm_solver(prediction: str, final: str, spacing: str, steps: int) -> None:
    config = {**SCHEDULER, "prediction_type": prediction, "timestep_spacing": spacing, "final_sigmas_type": final}
    scheduler = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(steps)
    assert_close(ours(config, steps, "dpmpp_2m"), stock(scheduler))


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_dpm_solver_with_zero_terminal_snr(spacing: str, steps: int) -> None:
    config = {**SCHEDULER, **ZERO_SNR, "timestep_spacing": spacing}
    scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps)
    assert_close(ours(config, steps, "dpmpp_2m"), stock(scheduler))


@pytest.mark.parametrize("steps", [3, 10])
def test_euler_of_a_variance_preserving_model(steps: int) -> None:
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(steps)
    # stock Euler keeps x / alpha; with leading spacing its start is exactly the noise over alpha
    assert_close(ours(SCHEDULER, steps, "euler"), stock(scheduler))


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


@pytest.mark.parametrize("steps", [2, 7, 28])
@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift: float, terminal: float | None, steps: int) -> None:
    config = {**FLOW, "shift": shift, "shift_terminal": terminal}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    schedule, _ = make_schedule(config, steps)
    np.testing.assert_allclose([s.timestep for s in schedule.steps], scheduler.timesteps.numpy(), rtol=1e-5)
    assert_close(ours(config, steps, "auto"), stock(scheduler))


@pytest.mark.parametrize("steps", [2, 7, 28])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize(("kind", "mu"), [("exponential", 0.5), ("exponential", 1.15), ("linear", 2.0)])
def test_flow_matching_with_a_shift_for_the_image_size(
    kind: str, mu: float, terminal: float | None, steps: int
) -> None:
    config = {**FLOW, "use_dynamic_shifting": True, "shift_terminal": terminal, "time_shift_type": kind}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert_close(ours({**config, "mu": mu, "sigmas": linear(steps)}, steps, "auto"), stock(scheduler))


GIVEN = [0.98, 0.7, 0.31, 0.3, 0.05]
SHIFTS: dict[str, dict[str, Any]] = {
    "none": {},
    "static": {"shift": 3.0},
    "static below 1": {"shift": 0.7, "num_train_timesteps": 250},
    "exponential": {"use_dynamic_shifting": True, "shift": 3.0, "mu": 1.15},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "mu": 0.6},
}


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("asked", [1, 2, 7, 28, 50, "linear 1", "linear 9", "linear 50", "given"])
def test_levels_of_flow_matching_are_stocks_to_the_last_bit(asked: Any, shift: str, terminal: float | None) -> None:
    """What set_timesteps makes of a number of steps, of the pipelines' linspace, and of given sigmas."""
    settings = {**FLOW, **SHIFTS[shift], "shift_terminal": terminal}
    mu = settings.get("mu")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in settings.items() if k != "mu"})
    if asked == "given":
        steps, told, stocks = len(GIVEN), {"sigmas": GIVEN}, {"sigmas": GIVEN}
    elif isinstance(asked, str):
        steps = int(asked.split()[1])
        told, stocks = {"spacing": "linear"}, {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        assert linear(steps) == stocks["sigmas"].tolist()
    else:
        steps, told, stocks = asked, {}, {"num_inference_steps": asked}
    if terminal and steps == 1:
        with pytest.raises(UserError, match="shift_terminal, which needs at least 2"):
            make_schedule(settings, steps, **told)
        return
    scheduler.set_timesteps(**stocks, mu=mu)
    # what a family's pipeline passes gives way to what is asked for
    given = {**settings, "sigmas": [0.5] * steps} if told else settings
    schedule, solver = make_schedule(given, steps, **told)
    assert solver == "euler"
    assert [step.sigma for step in schedule.steps] == scheduler.sigmas[:-1].tolist()
    assert [step.next_sigma for step in schedule.steps] == scheduler.sigmas[1:].tolist()
    assert [step.alpha for step in schedule.steps] == [1 - s for s in scheduler.sigmas[:-1].tolist()]
    assert [float(schedule.timestep(i, "cpu")) for i in range(steps)] == scheduler.timesteps.tolist()
    assert schedule.last_sigma == float(scheduler.sigmas[-2])
    assert_close(ours(given, steps, "auto", **told), stock(scheduler))


def test_the_last_sigma_of_known_models() -> None:
    """What a model's stock schedule leaves for the last step, and what others give it."""
    sd35, qwen = {**FLOW, "shift": 3.0}, {**FLOW, **SHIFTS["exponential"], "mu": 0.6935, "shift_terminal": 0.02}

    def last(config: dict[str, Any], steps: int, **settings: Any) -> float:
        return round(make_schedule(config, steps, **settings)[0].last_sigma, 4)

    assert (last(sd35, 28), last(sd35, 50)) == (0.0089, 0.0089)
    assert last(sd35, 25, spacing="linear") == 0.1111
    assert last(qwen, 50, spacing="linear") == last(qwen, 4, sigmas=[0.9, 0.8, 0.7, 0.6]) == 0.02


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_of_flow_matching(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(1)
    assert_close(ours({**FLOW, "shift": shift}, 1, "euler"), stock(scheduler))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"trained_betas": np.linspace(1e-3, 2e-2, 100).tolist(), "num_train_timesteps": 100},
        {"num_train_timesteps": 250},
    ],
)
def test_levels(settings: dict[str, Any]) -> None:
    expected = DDIMScheduler(**settings).alphas_cumprod.double()
    torch.testing.assert_close(alphas_cumprod(settings), expected, rtol=2e-4, atol=1e-7)


def test_a_plain_configuration_is_read_with_diffusers_defaults() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    assert_close(ours({"clip_sample": False}, 10, "auto"), stock(scheduler))


@pytest.mark.parametrize(
    ("config", "settings", "says"),
    [
        (SCHEDULER, {"steps": 0}, "sampler.steps is 0; this model takes 1 to 1000"),
        (SCHEDULER, {"steps": 1001}, "sampler.steps is 1001"),
        (SCHEDULER, {"steps": 1000}, "steps_offset=1"),
        (SCHEDULER, {"solver": "heun"}, "unknown solver 'heun'"),
        (SCHEDULER, {"spacing": "karras"}, "unknown spacing 'karras'"),
        ({**SCHEDULER, "beta_schedule": "sigmoid"}, {}, "beta_schedule 'sigmoid'"),
        ({**SCHEDULER, "prediction_type": "score"}, {}, "prediction_type 'score'"),
        ({**SCHEDULER, "timestep_spacing": "log"}, {}, "timestep_spacing 'log'"),
        ({**SCHEDULER, "clip_sample": True}, {}, "clip_sample: true"),
        ({**SCHEDULER, "thresholding": True}, {}, "thresholding: true"),
        ({**SCHEDULER, "rescale_betas_zero_snr": True}, {}, "zero terminal SNR"),
        (FLOW, {"solver": "ddim"}, "use euler for this flow-matching model"),
        (FLOW, {"spacing": "trailing"}, "does not apply to flow-matching models; choose linear"),
        (SCHEDULER, {"spacing": "linear"}, "is for flow-matching models, and this one is none; choose leading"),
        (SCHEDULER, {"sigmas": [0.5] * 10}, "sampler.sigmas is for flow-matching models, and this one is none"),
        ({**FLOW, "use_exponential_sigmas": True}, {"spacing": "linear"}, "use_exponential_sigmas: true"),
        ({**FLOW, "use_beta_sigmas": True}, {"sigmas": linear(10)}, "use_beta_sigmas: true"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            {},
            "DPMSolverMultistepScheduler, has prediction_type 'flow_prediction'",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
            {"solver": "ddim"},
            "UniPCMultistepScheduler, has prediction_type 'flow_prediction'",
        ),
        ({**FLOW, "_class_name": "FlowMatchLCMScheduler"}, {}, "set sampler.solver=euler"),
        ({**FLOW, "use_karras_sigmas": True}, {}, "use_karras_sigmas: true"),
        ({**FLOW, "use_dynamic_shifting": True}, {}, "must give mu"),
        ({**FLOW, "shift_terminal": 0.1}, {"steps": 1}, "shift_terminal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_sampled_is_refused(config: dict[str, Any], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        make_schedule(config, **{"steps": 10, **settings})
    assert says in str(error.value)


FOLLOWED = {
    "EulerDiscreteScheduler": "euler", "DPMSolverMultistepScheduler": "dpmpp_2m", "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim", "FlowMatchEulerDiscreteScheduler": "euler",
}  # fmt: skip
REPLACED = {
    "EulerAncestralDiscreteScheduler": "ddim", "UniPCMultistepScheduler": "ddim", "DDPMScheduler": "ddim",
    "FlowMatchHeunDiscreteScheduler": "euler",
}  # fmt: skip


@pytest.mark.parametrize("cls", [*FOLLOWED, *REPLACED])
def test_the_solver_follows_the_models_own_scheduler(cls: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it cannot, one line says what is used in its place; none where another solver is asked for."""
    notice.cache_clear()
    config = FLOW if cls.startswith("Flow") else SCHEDULER
    for _ in range(2):
        assert make_schedule({**config, "_class_name": cls}, 6)[1] == {**FOLLOWED, **REPLACED}[cls]
    line = (
        f"draftplus: the model's scheduler is {cls}; sampler.solver=auto samples with {REPLACED.get(cls)} in its place"
    )
    assert capsys.readouterr().err.splitlines() == [line] * (cls in REPLACED)
    notice.cache_clear()
    make_schedule({**config, "_class_name": cls}, 6, "euler")
    assert not capsys.readouterr().err


def test_stochastic_steps_need_ddim() -> None:
    for name, eta in (("dpmpp_2m", 0.5), ("euler", 1.0), ("ddim", 1.5), ("ddim", -0.1)):
        with pytest.raises(UserError, match=r"sampler\.eta"):
            make_solver(name, eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_levels_that_the_stock_pipeline_passes(shift: float, terminal: float | None) -> None:
    """As FLUX.1-schnell does: linspace(1, 1/n, n) with a static shift, which is not the scheduler's own spacing."""
    levels = [1.0, 0.75, 0.5, 0.25]
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "shift_terminal": terminal}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    scheduler.set_timesteps(sigmas=levels)
    found = ours({**config, "sigmas": levels}, 4, "auto")
    assert_close(found, stock(scheduler))
    if terminal is None:
        assert (found - ours(config, 4, "auto")).abs().max() > 1e-3
    with pytest.raises(ValueError, match="4 sigmas for 5 steps"):
        make_schedule({**config, "sigmas": levels}, 5)


def test_dynamic_shift_is_a_plain_shift_by_exp_mu() -> None:
    moving, _ = make_schedule({**FLOW, "use_dynamic_shifting": True, "mu": 0.7}, 8, spacing="linear")
    levels = [s.sigma for s in moving.steps]
    for found, s in zip(levels, np.linspace(1, 1 / 8, 8), strict=True):
        assert found == pytest.approx(exp(0.7) / (exp(0.7) + 1 / s - 1))
