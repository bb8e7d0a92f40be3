"""Scheduler files as people have them, with nothing chosen for them: each picture is that of the stock class.

The stock class of a solver, given the same file by `from_config`, is the judge of every setting that it reads. The
spacing is the file's, or where the file has none that of the stock class.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from draftplus import rng
from draftplus.build import build_sampler
from draftplus.config import SamplerConfig
from draftplus.errors import UserError, notice
from tests.support.schedulers import as_saved, ours, stock
from tests.tiny import PROMPTS, SCHEDULER, SHAPE, stock_pipeline, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*", "ignore::FutureWarning")

JUDGES = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
BARE = {key: value for key, value in SCHEDULER.items() if key != "timestep_spacing"}  # as Stable Diffusion 1.5's
NOISE = {key: value for key, value in BARE.items() if key.startswith(("num", "beta"))}

# as diffusers saves a model of each: all settings of the class, its own spacing among them
SAVED_BY = [
    "PNDM", "DDIM", "DDPM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "DPMSolverMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DEISMultistep",
    "UniPCMultistep", "LCM", "TCD",
]  # fmt: skip


def judged(cls: Any, config: dict[str, Any], steps: int, solver: str) -> None:
    """Ours against the stock class that reads the same file."""
    scheduler = cls.from_config(config)
    scheduler.set_timesteps(steps)
    expected, found = stock(scheduler).double(), ours(config, steps, solver)
    size = max(float(expected.abs().max()), float(scheduler.init_noise_sigma) if solver in JUDGES else 1.0)
    assert size < float("inf")
    # where the first level has hardly any signal, latents of 10^4 multiply the rounding of the stock float32 tables
    torch.testing.assert_close(found, expected, atol=max(1e-4, 1e-5 * size), rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 10, 21])
@pytest.mark.parametrize("solver", JUDGES)
def test_a_file_without_a_spacing(solver: str, steps: int) -> None:
    judged(JUDGES[solver], BARE, steps, solver)
    if solver != "ddim":  # the fault would be seen
        other = ours(BARE, steps, solver, spacing="leading")
        assert (other - ours(BARE, steps, solver)).abs().max() > 1e-3


@pytest.mark.parametrize("solver", JUDGES)
@pytest.mark.parametrize("saved_by", SAVED_BY)
def test_a_file_saved_by_each_class(saved_by: str, solver: str) -> None:
    cls = getattr(diffusers, f"{saved_by}Scheduler")
    known = inspect.signature(cls).parameters
    file = as_saved(cls(**{key: value for key, value in BARE.items() if key in known}))
    file["clip_sample"] = False  # as the stock pipeline's constructor sets it
    if saved_by == "DEISMultistep" and solver == "dpmpp_2m":  # which stock refuses for a reason that is none
        assert file["algorithm_type"] == "deis"
        expected, file = ours(file, 5, solver), {**file, "algorithm_type": "dpmsolver++"}
        assert torch.equal(ours(file, 5, solver), expected)
    for config in (file, {key: value for key, value in file.items() if key != "timestep_spacing"}):
        if solver == "ddim" and config.get("timestep_spacing") == "linspace":
            continue  # where we differ from stock, tests/parity/test_schedulers.py
        for steps in (5, 20):
            judged(JUDGES[solver], config, steps, solver)


MULTISTEP: dict[str, list[Any]] = {
    "solver_order": [1, 2],
    "solver_type": ["midpoint", "heun"],
    "lower_order_final": [False, True],
    "euler_at_final": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "use_karras_sigmas": [False, True],
}


@pytest.mark.parametrize("steps", [2, 17])
def test_dpm_solver_with_every_combination_of_settings(steps: int) -> None:
    pictures = {}
    for values in product(*MULTISTEP.values()):
        config = {**BARE, **dict(zip(MULTISTEP, values, strict=True))}
        pictures[values] = ours(config, steps, "dpmpp_2m")
        assert pictures[values].isfinite().all()
        order, kind, lower, plain, final, karras = values
        still_at_second_order = final == "sigma_min" and karras and order == 2 and not plain
        if still_at_second_order and kind == "heun" and not (lower and steps < 15):
            continue  # stock divides 0 by 0
        judged(DPMSolverMultistepScheduler, config, steps, "dpmpp_2m")
    # each setting matters in some combination, so that one that is ignored would be seen
    for place, (key, (one, other)) in enumerate(MULTISTEP.items()):
        pairs = [(v, (*v[:place], other, *v[place + 1 :])) for v in pictures if v[place] == one]
        moved = max(float((pictures[first] - pictures[second]).abs().max()) for first, second in pairs)
        assert moved > 1e-3 or (steps, key) in ((2, "solver_type"), (17, "lower_order_final")), key


@pytest.mark.parametrize("steps", [1, 9])
def test_euler_with_every_combination_of_settings(steps: int) -> None:
    for spacing, final, karras, prediction, ends in product(
        [None, "leading", "trailing", "linspace"], ["zero", "sigma_min"], [False, True],
        ["epsilon", "v_prediction", "sample"], [{}, {"sigma_min": 0.05, "sigma_max": 9.0}],
    ):  # fmt: skip
        config = {
            **BARE,
            **ends,
            "final_sigmas_type": final,
            "use_karras_sigmas": karras,
            "prediction_type": prediction,
        }
        judged(
            EulerDiscreteScheduler,
            config if spacing is None else {**config, "timestep_spacing": spacing},
            steps,
            "euler",
        )


# for every setting that a stock class reads, values other than its default
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.001],
    "beta_end": [0.02],
    "beta_schedule": ["linear", "squaredcos_cap_v2"],
    "trained_betas": [torch.linspace(1e-3, 2e-2, 1000).tolist(), [0.1, 0.2]],
    "clip_sample": [True],
    "clip_sample_range": [0.1],
    "set_alpha_to_one": [True],
    "steps_offset": [0, 7],
    "prediction_type": ["v_prediction", "sample", "original_sample", "flow_prediction"],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.5],
    "sample_max_value": [0.5],
    "timestep_spacing": ["leading", "trailing", "linspace", "log"],
    "rescale_betas_zero_snr": [True],
    "solver_order": [1, 3],
    "algorithm_type": ["dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"],
    "solver_type": ["heun", "logrho", "bh1", "bh2", "rk4"],
    "lower_order_final": [False],
    "euler_at_final": [True],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "final_sigmas_type": ["sigma_min", "none"],
    "lambda_min_clipped": [-5.1, -1.0],
    "variance_type": ["fixed_small", "learned", "learned_range"],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear", "cubic"],
    "interpolation_type": ["log_linear"],
    "sigma_min": [0.1],
    "sigma_max": [5.0],
    "timestep_type": ["continuous"],
    "shift": [3.0],
    "base_shift": [0.1],
    "max_shift": [3.0],
    "base_image_seq_len": [16],
    "max_image_seq_len": [32],
    "invert_sigmas": [True],
    "shift_terminal": [0.1],
    "stochastic_sampling": [True],
}
SAYS = {
    "rescale_betas_zero_snr": "zero terminal SNR",
    "use_dynamic_shifting": "must give mu",
    "prediction_type": "prediction_type|flow-matching",
}


@pytest.mark.parametrize(
    ("solver", "cls"), [*JUDGES.items(), ("auto", FlowMatchEulerDiscreteScheduler)], ids=lambda value: str(value)
)
def test_every_setting_of_the_stock_class_is_honoured_or_refused_by_name(solver: str, cls: Any) -> None:
    base = {"_class_name": "FlowMatchEulerDiscreteScheduler"} if solver == "auto" else BARE
    if cls is DDIMScheduler:
        base = {**base, "clip_sample": False}
    for key in inspect.signature(cls).parameters:
        for value in VALUES[key]:  # a KeyError is a setting that is new in diffusers
            if cls is DDIMScheduler and value == "linspace":
                continue
            for prediction in ("epsilon", "v_prediction"):
                config = {**base, "prediction_type": prediction} if solver != "auto" else dict(base)
                config[key] = value
                try:
                    ours(config, 10, solver)
                except UserError as error:
                    assert re.search(SAYS.get(key, key), str(error)) and "\n" not in str(error)
                    continue
                judged(cls, config, 10, solver)


def with_scheduler(model: Path, directory: Path, file: dict[str, Any]) -> Path:
    shutil.copytree(model, directory)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(file))
    index = json.loads((directory / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", file["_class_name"]]
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def picture(directory: Path, solver: str, steps: int = 6) -> torch.Tensor:
    made = tiny_model(directory, trainable=False)
    sampler = build_sampler(made, SamplerConfig(solver=solver, steps=steps, guidance_scale=4.0, negative_prompt=""))
    with torch.no_grad():
        return sampler.sample(made.encode(PROMPTS), sampler.start(rng.stock_noise(SHAPE, [1, 2, 3]).double())).latents


def stock_picture(directory: Path, steps: int = 6, cls: Any = None) -> torch.Tensor:
    pipe = stock_pipeline(directory)
    if cls is not None:  # as docs/models.md says
        pipe.scheduler = cls.from_config(pipe.scheduler.config, clip_sample=False, steps_offset=1)
    latents = rng.stock_noise(SHAPE, [1, 2, 3]).double()
    made: torch.Tensor = pipe(
        PROMPTS, latents=latents, num_inference_steps=steps, guidance_scale=4.0, output_type="latent"
    ).images
    return made


@pytest.mark.parametrize("cls", JUDGES.values())
def test_auto_is_the_stock_pipelines_own_solver(tiny_path: Path, tmp_path: Path, cls: Any) -> None:
    """Nothing is named on either side."""
    file = {"_class_name": cls.__name__, **NOISE, "prediction_type": "epsilon"}
    directory = with_scheduler(tiny_path, tmp_path / "model", file)
    found = picture(directory, "auto")
    torch.testing.assert_close(found, stock_picture(directory), atol=1e-4, rtol=0)
    assert cls is DDIMScheduler or (found - picture(directory, "ddim")).abs().max() > 1e-2


OLD = [{}, {"steps_offset": 0, "clip_sample": True}, {"steps_offset": 3}, {"steps_offset": 1, "clip_sample": False}]


@pytest.mark.parametrize("changes", OLD, ids=str)
@pytest.mark.parametrize("solver", JUDGES)
def test_the_stock_pipeline_of_a_file(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], solver: str, changes: dict[str, Any]
) -> None:
    """Loaded by `from_pretrained` and nothing else, with its constructor's repairs of old files."""
    file = {"_class_name": JUDGES[solver].__name__, **NOISE, "prediction_type": "epsilon", **changes}
    file |= {"timestep_spacing": "leading"} if solver != "ddim" else {}  # where the offset matters
    directory = with_scheduler(tiny_path, tmp_path / "model", file)
    notice.cache_clear()
    found = picture(directory, solver)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("draftplus: ")]
    torch.testing.assert_close(found, stock_picture(directory), atol=1e-4, rtol=0)
    offset, clip = changes.get("steps_offset", 0), changes.get("clip_sample", False)
    assert len(said) == (offset != 1 or clip)
    assert all((f"steps_offset {offset} as 1" in line) is (offset != 1) for line in said)
    assert all(("clip_sample true as false" in line) is clip for line in said)


@pytest.mark.parametrize("changes", [{}, {"clip_sample": True, "steps_offset": 0}], ids=str)
@pytest.mark.parametrize("cls", JUDGES.values())
def test_another_solver_than_the_files(tiny_path: Path, tmp_path: Path, cls: Any, changes: dict[str, Any]) -> None:
    """Most models come with PNDM: the documented way to give a stock pipeline our solver draws our picture."""
    file = {"_class_name": "PNDMScheduler", **NOISE, "set_alpha_to_one": False, "skip_prk_steps": True, **changes}
    directory = with_scheduler(tiny_path, tmp_path / "model", file)
    solver = {judge: name for name, judge in JUDGES.items()}[cls]
    torch.testing.assert_close(picture(directory, solver), stock_picture(directory, cls=cls), atol=1e-4, rtol=0)
