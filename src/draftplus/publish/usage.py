"""How a result is used elsewhere: the lines for stock diffusers, and in words for programs with a window."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftplus.config import Config, ModelConfig, SamplerConfig
from draftplus.diffusion.levels import LINEAR
from draftplus.diffusion.methods import gated_steps
from draftplus.diffusion.schedule import is_flow
from draftplus.errors import UserError
from draftplus.models.families import FAMILIES, MODELS, Family, index_of
from draftplus.models.paths import PACKAGED, is_single_file, looks_local
from draftplus.models.scheduler_file import SCHEDULERS, sampled_with, scheduler_config
from draftplus.models.stored import loaded_variant

STABLE_DIFFUSION = "StableDiffusionPipeline"  # whose constructor repairs old files, which from_config forgets


def is_local(path: str) -> bool:
    """Whether a model's path is a directory or file of this machine, not a hub id."""
    return looks_local(path) or is_single_file(path) or Path(path).exists()


def public(value: Any) -> Any:
    """A value of the configuration without the directories of the machine that it comes from."""
    if isinstance(value, list):
        return [public(one) for one in value]
    local = isinstance(value, str) and value.startswith(("/", "~", "."))
    return Path(value).name if local else value


def _index(model: ModelConfig) -> Mapping[str, Any]:
    try:
        return index_of(model)
    except UserError:  # it is not at hand, as of runs from before there were other families
        return {"_class_name": STABLE_DIFFUSION}


def pipeline_of(model: ModelConfig) -> str:
    """The class of a model's stock pipeline, as far as it is known."""
    return str(_index(model)["_class_name"])


def family_of(model: ModelConfig) -> Family:
    """The family of a model, as far as it is known."""
    return FAMILIES[pipeline_of(model)]


def _is_flow(config: Config) -> bool:
    file = scheduler_config(config.model)
    return is_flow(file) if file else family_of(config.model).component != "unet"


def _scheduler(config: Config) -> tuple[str, dict[str, Any]] | None:
    """The scheduler class that stock diffusers needs, and what it must be told; None for the model's own as it is."""
    file, sampler = scheduler_config(config.model), config.sampler
    name, changes, _ = SCHEDULERS[sampled_with(config)]
    stable, own = pipeline_of(config.model) == STABLE_DIFFUSION, name == file.get("_class_name")
    if _is_flow(config) or (own and not stable and sampler.spacing is None):
        return None
    changes = changes | ({"steps_offset": 1} if stable else {})
    return name, changes | ({"timestep_spacing": sampler.spacing} if sampler.spacing else {})


def stock_scheduler(config: Config, file: Mapping[str, Any]) -> Any:
    """The scheduler of stock diffusers that samples as a run does. file: the model's scheduler configuration."""
    import diffusers

    name, changes = _scheduler(config) or (file["_class_name"], {})
    return getattr(diffusers, name).from_config(dict(file), **changes)


def snippet(config: Config, form: str, lora: bool, file: str, dtype: str | None, prompt: str) -> str:
    """Python that draws a picture of the prompt with stock diffusers, run beside the exported files.

    file: of the adapter. dtype: of merged weights, which follow no gate.
    """
    pipeline, family, scheduler = pipeline_of(config.model), family_of(config.model), _scheduler(config)
    whole = form == "diffusers" and not lora
    gate = 0 if form == "merged" else gate_of(config)
    classes = [scheduler[0]] if scheduler and form != "merged" else []
    classes += [pipeline, *([family.denoiser] if whole else [])]
    lines = ["import numpy"] if config.sampler.spacing == LINEAR else []
    lines += ["import torch", f"from diffusers import {', '.join(classes)}", ""]
    lines.append('here = "."  # this directory, or its name on the hub')
    if form == "merged":
        given = f", torch_dtype=torch.{dtype}" if dtype not in (None, "float32") else ""
        lines.append(f"pipeline = {pipeline}.from_pretrained(here{given})")
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
        if model.dtype != "float32" and not whole:  # what was tuned as a whole is in float32, and fits no other half
            given += f", torch_dtype=torch.{model.dtype}"
        if model.quantize is not None and not whole:
            imports, made = _quantised(model, family.component)
            lines[lines.index("") : lines.index("")] = imports
            lines.append(made)
            given += ", quantization_config=quantized"
        # which stock does without only where it is told so
        for name, told_of in _index(model).items():
            if told_of == [None, None] and name.startswith(("text_encoder", "tokenizer")):
                given += f", {name}=None"
        tuned = f"{family.denoiser}.from_pretrained(here)"
        part = f", {family.component}={tuned}" if whole and not gate else ""
        lines += [f"tuned = {tuned}"] if whole and gate else []
        lines.append(f"pipeline = {pipeline}.{load}(base{given}{part})")
        if scheduler:
            mended = "".join(f", {key}={value!r}" for key, value in scheduler[1].items())
            lines.append(f"pipeline.scheduler = {scheduler[0]}.from_config(pipeline.scheduler.config{mended})")
        if lora:
            lines.append(f'pipeline.load_lora_weights(here, weight_name="{file}")')
    if config.model.vae_tiling:
        lines.append("pipeline.vae.enable_tiling()")
    call = _call(config, prompt)
    if gate:
        lines += _gated(gate, config, family.component if whole else None)
        call.append("callback_on_step_end=switch")
    return "\n".join([*lines, "image = pipeline(", *(f"    {one}," for one in call), ").images[0]"])


def gate_of(config: Config) -> int:
    """How many of a run's sampling steps the base model draws."""
    gate, steps = config.objective.gate, config.sampler.steps
    return gated_steps(gate, steps) if gate and steps else 0


def _gated(gate: int, config: Config, component: str | None) -> list[str]:
    """Lines that let the base model draw the first steps. component: what was tuned as a whole; None: there is LoRA."""
    base, tuned = "pipeline.disable_lora()", "pipeline.enable_lora()"
    first = "the first step" if gate == 1 else f"the first {gate} steps"
    lines = [f"# the base model draws {first} of {config.sampler.steps}; say so before every picture", base]
    if component is not None:
        tuned = f"pipeline.{component} = tuned"
        lines = [f"base_{component} = pipeline.{component}", lines[0], f"pipeline.{component} = base_{component}"]
    return [
        "", *lines, "", "",
        "def switch(pipeline, step, timestep, tensors):",
        f"    if step == {gate - 1}:  # counted from 0, and done",
        f"        {tuned}",
        "    return tensors",
        "", "",
    ]  # fmt: skip


def _quantised(model: ModelConfig, denoiser: str) -> tuple[list[str], str]:
    """The imports, and the line that makes `quantized`, by which stock quantises what draftplus does."""
    encoders = [name for name, told in _index(model).items() if name.startswith("text_encoder") and told[0]]
    imports = ["from diffusers.quantizers import PipelineQuantizationConfig"]
    if model.quantize == "nf4":
        given = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{model.dtype}'
        ours, theirs = f"diffusers.BitsAndBytesConfig({given})", f"transformers.BitsAndBytesConfig({given})"
    else:
        weights = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[str(model.quantize)]
        imports.append(f"from torchao.quantization import {weights}")
        ours, theirs = f"diffusers.TorchAoConfig({weights}())", f"transformers.TorchAoConfig({weights}())"
    parts = [f'    "{denoiser}": {ours},', *(f'    "{name}": {theirs},' for name in encoders)]
    made = "\n".join(["quantized = PipelineQuantizationConfig(quant_mapping={", *parts, "})"])
    return ["import diffusers", "import transformers", *imports], made


def _call(config: Config, prompt: str) -> list[str]:
    sampler, family = config.sampler, family_of(config.model)
    stocks = sampler.negative_prompt == family.sampler.get("negative_prompt")  # where none is given
    told = {
        "num_inference_steps": sampler.steps, family.scale: sampler.guidance_scale,
        "negative_prompt": None if stocks else sampler.negative_prompt, "eta": sampler.eta or None,
        "height": sampler.height, "width": sampler.width, "sigmas": sampler.sigmas,
    }  # fmt: skip
    given = [f"{key}={_text(value)}" for key, value in told.items() if value is not None]
    if sampler.spacing == LINEAR:
        given.append(f"sigmas=numpy.linspace(1, 1 / {sampler.steps}, {sampler.steps}).tolist()")
    return [f"prompt={_text(prompt)}", *given, 'generator=torch.Generator("cpu").manual_seed(0)']


def _text(value: Any) -> str:
    """A text or number as Python writes it."""
    return json.dumps(value, ensure_ascii=False)


def elsewhere(config: Config, form: str, lora: bool, file: str) -> str:
    """A paragraph about ComfyUI, AUTOMATIC1111 and programs like them."""
    sampler, called = config.sampler, "Euler" if _is_flow(config) else SCHEDULERS[sampled_with(config)][2]
    stable = pipeline_of(config.model).startswith(STABLE_DIFFUSION.removesuffix("Pipeline")) and not _is_flow(config)
    settings = (
        f"Sampler {called}, {sampler.steps} steps, {'CFG scale' if stable else 'guidance'} {sampler.guidance_scale}"
    )
    if _is_flow(config):
        settings += f", the model's own shift{_levels(sampler)}"
    if sampler.negative_prompt:
        settings += f", negative prompt “{sampler.negative_prompt}”"
    settings += _gate_elsewhere(config, form)
    if form == "kohya":
        word = file.removesuffix(".safetensors")
        return (
            f"**ComfyUI**: put `{file}` into `models/loras` and load it with the node *Load LoRA*; it has no part for "
            "the text encoder, so only `strength_model` counts. **AUTOMATIC1111, Forge, SD.Next**: put it into "
            f"`models/Lora` and add `<lora:{word}:1>` to the prompt. **InvokeAI** imports it in its model manager. "
            f"Use it with the base model named above. {settings}."
        )
    if form == "merged" and not stable:
        return f"Programs with a window want another layout than that of this directory. {settings}."
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


def _gate_elsewhere(config: Config, form: str) -> str:
    gate, steps = gate_of(config), config.sampler.steps
    if not gate:
        return ""
    tuned = "the merged weights draw" if form == "merged" else "the tuned weights draw"
    told = f". These programs know of no gate: with them {tuned} all {steps} steps, and other pictures than those above"
    if form != "kohya":
        return told
    return (
        f"{told}. In ComfyUI two nodes *KSampler (Advanced)* in a row follow it: the first with the base model, "
        f"`start_at_step` 0, `end_at_step` {gate} and `return_with_leftover_noise` enabled, the second with the LoRA, "
        f"`add_noise` disabled and `start_at_step` {gate}"
    )


def _levels(sampler: SamplerConfig) -> str:
    if sampler.sigmas is not None:
        return f" of the noise levels (sigmas) {', '.join(f'{one:g}' for one in sampler.sigmas)}, and 0 at the end"
    if sampler.spacing == LINEAR:
        return f" of noise levels (sigmas) that fall evenly from 1 to 1/{sampler.steps}, and 0 at the end"
    return ""
