"""The weights of a run in the forms that other programs load, each in a directory with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from draftplus.build import build_model, quiet_libraries
from draftplus.config import Config
from draftplus.errors import UserError, notice
from draftplus.models.lora_files import LORA_FILE, read_lora
from draftplus.models.stored import stored_dtype
from draftplus.models.tuned import GATE
from draftplus.publish.card import files_of_export, write_card
from draftplus.publish.usage import gate_of, pipeline_of, stock_scheduler
from draftplus.report.read import Run, read_run
from draftplus.runs.checksums import files_hash
from draftplus.runs.directory import is_run, saved_steps, step_name
from draftplus.runs.files import whole_directory
from draftplus.runs.weights import find_weights, parted
from draftplus.weights import sort_metadata

KOHYA = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # for which diffusers has a converter


@dataclass(frozen=True)
class Export:
    """What is exported. step: of the weights. label: of the run, with the step where it was asked for."""

    run: Run
    config: Config
    adapter: Path
    step: int
    label: str

    @property
    def is_lora(self) -> bool:
        return (self.adapter / LORA_FILE).is_file()


def export_run(target: str, form: str = "diffusers", output: Path | None = None) -> Path:
    """Writes the weights of RUN, RUN@step or RUN@best, and their card, as `api.export` says. Returns the directory."""
    if form not in FORMATS:
        raise UserError(f"format '{form}': choose one of {', '.join(FORMATS)}")
    path, _, at = parted(target)
    if not is_run(path):
        raise UserError(f"'{target}' is not a run directory; export takes RUN, RUN@step or RUN@best")
    weights = find_weights(target, code=())
    assert weights.adapter is not None
    run = read_run(Path(path))
    step = _step(weights.adapter, run)
    what = Export(run, weights.config, weights.adapter, step, weights.label)
    if form == "kohya" and not what.is_lora:
        raise UserError(
            f"{path} is a fully fine-tuned denoiser, and the format kohya is for LoRA adapters; use diffusers or merged"
        )
    quantised = weights.config.model.quantize
    if form == "merged" and quantised is not None:
        raise UserError(
            f"{path} was trained on a model with model.quantize={quantised}, and adapters cannot be merged into such "
            "weights; use diffusers, whose adapter stock diffusers puts on the model, quantised or not"
        )
    directory = output or Path(path) / "export" / (f"{form}-step-{step:06d}" if at else form)
    _refuse_foreign(directory)
    quiet_libraries()
    with whole_directory(directory) as building:
        told = FORMATS[form](what, building)
        write_card(building, form, what.run, what.config, step, what.label, what.is_lora, told)
    gate, steps = gate_of(what.config), what.config.sampler.steps
    if gate and form in NO_GATE:
        notice(
            f"the format {form} has no gate: {NO_GATE[form]} all {steps} sampling steps, where in {what.label} the "
            f"base model draws the first {gate}; README.md tells of it"
        )
    return directory


def _step(adapter: Path, run: Run) -> int:
    """The step of trained weights. adapter/ may be older than the last step, while the run is continued.

    Raises UserError where the run's saved steps have other weights.
    """
    name, saved = adapter.name.removeprefix("step-"), run.directory / "adapters"
    if name.isdigit():
        return int(name)
    steps = saved_steps(saved)
    if not steps:  # they were removed
        return max((row.step for row in run.evaluations), default=0)
    wanted = files_hash(adapter)
    for step in reversed(steps):
        if files_hash(saved / step_name(step)) == wanted:
            return step
    raise UserError(f"{adapter} has the weights of none of the steps in {saved}; name a step: {run.directory}@STEP")


def _refuse_foreign(directory: Path) -> None:
    """UserError for a path where something stands that export has not written, which would be lost."""
    if directory.suffix in (".safetensors", ".ckpt"):
        raise UserError(f"'{directory}': export writes a directory, with a model card; leave out {directory.suffix}")
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise UserError(f"'{directory}' exists and is not a directory; name another output")
    other = sorted({path.name for path in directory.iterdir()} - files_of_export(directory))
    if other:
        raise UserError(
            f"'{directory}' holds something that export did not write ('{other[0]}', for one); name another output"
        )


def _diffusers(what: Export, directory: Path) -> dict[str, Any]:
    for file in what.adapter.iterdir():
        if file.suffix in (".safetensors", ".json"):
            shutil.copyfile(file, directory / file.name)
    return {}


def _kohya(what: Export, directory: Path) -> dict[str, Any]:
    pipeline = pipeline_of(what.config.model)
    if pipeline not in KOHYA:
        raise UserError(
            f"{what.label} is tuned from a {pipeline}, for which the format kohya does not exist; use diffusers"
        )
    state = load_file(what.adapter / LORA_FILE)
    ranks = {tensor.shape[0] for name, tensor in state.items() if "lora_A" in name}
    header = {"format": "pt", "ss_network_module": "networks.lora", "ss_output_name": what.label}
    header |= {GATE: repr(what.config.objective.gate)} if what.config.objective.gate else {}  # draftplus reads it
    header |= {"ss_network_dim": str(max(ranks)), "ss_network_alpha": str(max(ranks))}
    widths = {tensor.shape[1] for name, tensor in state.items() if name.endswith("attn2.to_k.lora_A.weight")}
    if pipeline == "StableDiffusionXLPipeline":  # AUTOMATIC1111 and Forge list a file only beside models of its version
        header["ss_base_model_version"] = "sdxl_base_v1-0"
    elif widths:
        header["ss_v2"] = str(widths == {1024})
    name = f"{what.label.replace('@', '-')}.safetensors"
    save_file(convert_state_dict_to_kohya(state), directory / name, metadata=header)
    sort_metadata(directory / name)
    unet = read_lora(directory / name, getattr(diffusers, pipeline)).half("unet", None)
    lost = state.keys() - {f"unet.{key}" for key in unet}
    if lost:  # of a layer that Stable Diffusion itself does not have
        raise UserError(
            f"the adapter's layer '{min(lost).partition('.lora_')[0]}' has no name in the format kohya; "
            "use diffusers or merged"
        )
    return {"file": name}


def _merged(what: Export, directory: Path) -> dict[str, Any]:
    base, cpu = what.config.model, torch.device("cpu")
    model = build_model(replace(base, dtype="float32"), cpu, trainable=False)  # now its files are at hand
    dtype = stored_dtype(base) or getattr(torch, base.dtype)
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        model = build_model(replace(base, dtype=name), cpu, trainable=False)
    model.tuned.load(what.adapter)
    model.tuned.merge()
    scheduler = stock_scheduler(what.config, model.scheduler_config)
    model.as_pipeline(scheduler).to(dtype=dtype).save_pretrained(directory)
    return {"dtype": name}


# the formats that cannot say that the base model draws the first steps, and what is done instead
NO_GATE = {"kohya": "other programs than draftplus draw with the adapter in", "merged": "its tuned weights draw"}
FORMATS: Mapping[str, Callable[[Export, Path], dict[str, Any]]] = {
    "diffusers": _diffusers,
    "kohya": _kohya,
    "merged": _merged,
}
