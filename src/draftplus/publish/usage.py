"""How a result is used elsewhere: the lines for stock diffusers, and in words for programs with a window."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftplus.config import Config, SamplerConfig
from draftplus.models.families import MODELS, model_path
from draftplus.models.loading import is_single_file, looks_local
from draftplus.models.single_file import PACKAGED
from draftplus.models.stored import loaded_variant

# sampler.solver -> the scheduler of stock diffusers, what it must be told, and what other programs call it
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, "DDIM"),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}, "Euler"),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"steps_offset": 1}, "DPM++ 2M"),
}  # as the stock pipeline's constructor repairs old files, which from_config forgets


def is_local(path: str) -> bool:
    """Whether a model's path is a directory or file of this machine, not a hub id."""
    return looks_local(path) or is_single_file(path) or Path(path).exists()


def public(value: Any) -> Any:
    """A value of the configuration without the directories of the machine that it comes from."""
    if isinstance(value, list):
        return [public(one) for one in value]
    local = isinstance(value, str) and value.startswith(("/", "~", "."))
    return Path(value).name if local else value


def _scheduler(sampler: SamplerConfig) -> tuple[str, dict[str, Any], str]:
    name, changes, called = SCHEDULERS["ddim" if sampler.solver == "auto" else sampler.solver]
    return name, changes | ({"timestep_spacing": sampler.spacing} if sampler.spacing else {}), called


def stock_scheduler(sampler: SamplerConfig, config: Mapping[str, Any]) -> Any:
    """The scheduler of stock diffusers that samples as a run does. config: the model's scheduler configuration."""
    import diffusers

    name, changes, _ = _scheduler(sampler)
    return getattr(diffusers, name).from_config(dict(config), **changes)


def differs_from_stock(config: Config) -> bool:
    """Whether the run sampled with DDIM and linspace spacing, whose noise levels are others than in stock diffusers."""
    from diffusers import DDIMScheduler

    if _scheduler(config.sampler)[0] != "DDIMScheduler" or config.sampler.spacing not in (None, "linspace"):
        return False
    told = {"subfolder": "scheduler", "revision": config.model.revision, "local_files_only": True}
    try:
        file = DDIMScheduler.load_config(config.model.config or model_path(config.model), **told)
    except (OSError, ValueError):  # a single file, say, whose families are not spaced so
        file = {}
    return (config.sampler.spacing or file.get("timestep_spacing")) == "linspace"


def snippet(config: Config, form: str, lora: bool, file: str, dtype: str | None, prompt: str) -> str:
    """Python that draws a picture of the prompt with stock diffusers, run beside the exported files.

    file: of the adapter. dtype: of merged weights.
    """
    name, changes, _ = _scheduler(config.sampler)
    classes = [*([] if form == "merged" else [name]), "StableDiffusionPipeline"]
    whole = form == "diffusers" and not lora
    lines = [f"from diffusers import {', '.join([*classes, *(['UNet2DConditionModel'] if whole else [])])}"]
    lines = ["import torch", *lines, "", 'here = "."  # this directory, or its name on the hub']
    if form == "merged":
        given = f", torch_dtype=torch.{dtype}" if dtype not in (None, "float32") else ""
        lines.append(f"pipeline = StableDiffusionPipeline.from_pretrained(here{given})")
    else:
        model = config.model
        if model.path in MODELS:
            lines.insert(0, "from importlib.resources import files\n")
            lines.append(f'base = str(files("draftplus") / "assets" / "{model.path}")')
        elif is_local(model.path):
            lines.append(f"base = {_text(Path(model.path).name)}  # where the base model lies on your disk")
        else:
            lines.append(f"base = {_text(model.path)}")
        load = "from_single_file" if is_single_file(model.path) else "from_pretrained"
        told = {"revision": model.revision, "variant": model.variant or loaded_variant(model)}
        if model.config not in PACKAGED:  # which stock does not have
            told["config"] = public(model.config)
        given = "".join(f", {key}={_text(value)}" for key, value in told.items() if value)
        unet = ", unet=UNet2DConditionModel.from_pretrained(here)" if whole else ""
        lines.append(f"pipeline = StableDiffusionPipeline.{load}(base{given}{unet})")
        mended = "".join(f", {key}={value!r}" for key, value in changes.items())
        lines.append(f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config{mended})")
        if lora:
            lines.append(f'pipeline.load_lora_weights(here, weight_name="{file}")')
    return "\n".join([*lines, "image = pipeline(", *(f"    {one}," for one in _call(config, prompt)), ").images[0]"])


def _call(config: Config, prompt: str) -> list[str]:
    sampler = config.sampler
    told = {
        "num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance_scale,
        "negative_prompt": sampler.negative_prompt or None, "eta": sampler.eta or None,
        "height": sampler.height, "width": sampler.width,
    }  # fmt: skip
    given = [f"{key}={_text(value)}" for key, value in told.items() if value is not None]
    return [_text(prompt), *given, 'generator=torch.Generator("cpu").manual_seed(0)']


def _text(value: Any) -> str:
    """A text or number as Python writes it."""
    return json.dumps(value, ensure_ascii=False)


def elsewhere(config: Config, form: str, lora: bool, file: str) -> str:
    """A paragraph about ComfyUI, AUTOMATIC1111 and programs like them."""
    sampler, called = config.sampler, _scheduler(config.sampler)[2]
    settings = f"Sampler {called}, {sampler.steps} steps, CFG scale {sampler.guidance_scale}"
    if sampler.negative_prompt:
        settings += f", negative prompt “{sampler.negative_prompt}”"
    if form == "kohya":
        word = file.removesuffix(".safetensors")
        return (
            f"**ComfyUI**: put `{file}` into `models/loras` and load it with the node *Load LoRA*; it has no part for "
            "the text encoder, so only `strength_model` counts. **AUTOMATIC1111, Forge, SD.Next**: put it into "
            f"`models/Lora` and add `<lora:{word}:1>` to the prompt. **InvokeAI** imports it in its model manager. "
            f"Use it with the base model named above. {settings}."
        )
    if form == "merged":
        return (
            "**ComfyUI**: put this directory into `models/diffusers` and load it with the node *DiffusersLoader*. "
            "**AUTOMATIC1111** and **Forge** take a single file, which the script "
            "`convert_diffusers_to_original_stable_diffusion.py` of diffusers makes of this directory. "
            f"{settings}."
        )
    other = "kohya" if lora else "merged"
    wanted = "other names in the file" if lora else "a whole model"
    return (
        f"ComfyUI, AUTOMATIC1111 and programs like them want {wanted}: `draftplus export … --format {other}`. "
        f"{settings}."
    )
