"""The model card, README.md as a model hub takes it: what was tuned and how, what came of it, and how to use it."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, hf_hub_download, metadata_load

from draftplus import __version__
from draftplus.config import Config, file_keys, flatten, to_dict
from draftplus.metrics.intervals import mean_over_images
from draftplus.models.families import MODELS
from draftplus.models.paths import is_single_file
from draftplus.models.scheduler_file import differs_from_stock, scheduler_config
from draftplus.publish.usage import elsewhere, family_of, gate_of, is_local, pipeline_of, public, snippet
from draftplus.report.read import Run
from draftplus.report.summary import gain_between, held_out_rewards
from draftplus.report.wording import method_in_words, setting, show, show_gain
from draftplus.runs.rows import HeldOut

MADE_HERE = re.compile(r"<!-- written by draftplus export: (.*) -->")  # the names of the files, as a JSON list
PICTURES = "images"
SHOWN = 4  # pictures of prompts of their own
LICENCES = {"emoji": {"license": "apache-2.0"}}  # of built-in models, as assets/LICENSES.md says
HERE = {"name", "output_dir", "device", "log.to"}  # keys that say nothing about the result


def write_card(
    directory: Path, form: str, run: Run, config: Config, step: int, label: str, lora: bool, told: dict[str, Any]
) -> None:
    """Writes README.md and the pictures that it shows. told: what the format tells of what it wrote."""
    file = told.get("file", "pytorch_lora_weights.safetensors")
    before, after = _evaluations(run, step)
    shown = _copy_pictures(run, step, directory, before, after)
    prompt = shown[0][0] if shown else "a cat"
    adapter = lora and form != "merged"
    known = ["stable-diffusion"] if pipeline_of(config.model).startswith("StableDiffusion") else []
    facts: dict[str, Any] = {
        **_base(config),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if _on_hub(config) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", *known, "diffusers", "draftplus", *(["lora"] if adapter else [])],
        "widget": [{"text": text, "output": {"url": url}} for text, url in shown] or None,
    }
    data = ModelCardData(**facts)
    network = "UNet" if family_of(config.model).component == "unet" else "transformer"
    kind = (
        "A LoRA adapter" if adapter else f"A fully fine-tuned {network}" if form == "diffusers" else "A whole pipeline"
    )
    base = config.model.path if _on_hub(config) or config.model.path in MODELS else Path(config.model.path).name
    method = _public_text(method_in_words(to_dict(config), run.last_sigma), config)
    parts = [
        f"---\n{data.to_yaml()}\n---\n<!-- written by draftplus export: {_names(directory)} -->\n\n# {label}\n",
        f"{kind} for reward fine-tuned text-to-image generation, of the base model `{base}`, at step {step}. "
        f"Trained with draftplus {__version__}.\n\n{method}",
        *(["<Gallery />"] if shown else []),
        _grids(directory),
        _numbers(before, after),
        f"## With diffusers\n\n```python\n{snippet(config, form, lora, file, told.get('dtype'), prompt)}\n```",
        _notes(config, form, told),
        f"## With other programs\n\n{elsewhere(config, form, lora, file)}",
        f"## Configuration\n\nWhat differs from the defaults of draftplus:\n\n```\n{_settings(config)}\n```",
    ]
    (directory / "README.md").write_text("\n\n".join(part.rstrip() for part in parts if part) + "\n", encoding="utf-8")


def files_of_export(directory: Path) -> set[str]:
    """The names of the files and directories that an export wrote there, by its card; none where there is no card."""
    card = directory / "README.md"
    made = MADE_HERE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    try:
        return {"README.md", *json.loads(made[1])} if made else set()
    except (ValueError, TypeError):
        return set()


def _names(directory: Path) -> str:
    return json.dumps(sorted(path.name for path in directory.iterdir()))


def _evaluations(run: Run, step: int) -> tuple[HeldOut | None, HeldOut | None]:
    """What was measured of the base model, if it was on the same images, and of a step."""
    rows = {row.step: row.held_out for row in run.evaluations}
    before, after = rows.get(0), rows.get(step)
    same = before and after and (before.prompts, before.images) == (after.prompts, after.images)
    return before if same else None, after


def _on_hub(config: Config) -> bool:
    return config.model.path not in MODELS and not is_local(config.model.path)


def _base(config: Config) -> dict[str, Any]:
    """base_model, where it is on the hub, and the licence fields of its own card, where they are known."""
    path = config.model.path
    if path in MODELS:
        return dict(LICENCES.get(path, {}))
    card: Path | None = Path(path).expanduser() / "README.md"
    if _on_hub(config):
        try:
            card = Path(hf_hub_download(path, "README.md", revision=config.model.revision, etag_timeout=5))
        except Exception:  # without the network, or a card: the licence is not known
            card = None
    try:
        known = metadata_load(card) if card is not None and card.is_file() else None
    except Exception:  # what stands there need not be YAML, whose errors are no ValueError
        known = None
    licence = {key: value for key, value in (known or {}).items() if key in ("license", "license_name", "license_link")}
    link = licence.get("license_link")
    if link and "://" not in link and _on_hub(config):  # a file beside the base model, which is not beside this one
        licence["license_link"] = f"https://huggingface.co/{path}/blob/main/{link}"
    return {**({"base_model": path} if _on_hub(config) else {}), **licence}


def _copy_pictures(
    run: Run, step: int, directory: Path, before: HeldOut | None, after: HeldOut | None
) -> list[tuple[str, str]]:
    """Copies the grids before and after, and a picture each of some prompts: these with their paths below."""
    (directory / PICTURES).mkdir()
    for name, at, there in (("before.png", 0, before), ("after.png", step, after)):
        if there and at in run.grids:
            shutil.copyfile(run.grids[at], directory / PICTURES / name)
    prompts = (after.prompts if after else []) or run.prompts  # the latter are those of the last evaluation
    shown: dict[int, tuple[str, str]] = {}
    for (number, _), picture in sorted(run.samples.get(step, {}).items()):
        if number not in shown and number < len(prompts) and len(shown) < SHOWN:
            shutil.copyfile(picture, directory / PICTURES / picture.name)
            shown[number] = (prompts[number], f"{PICTURES}/{picture.name}")
    return list(shown.values())


def _grids(directory: Path) -> str:
    rows = [("Base model", "before.png"), ("Tuned, same prompts and seeds", "after.png")]
    there = [(text, name) for text, name in rows if (directory / PICTURES / name).is_file()]
    if not there:
        return ""
    head, line = (" | ".join(cells) for cells in ([text for text, _ in there], ["---"] * len(there)))
    return f"| {head} |\n| {line} |\n| {' | '.join(f'![{text}]({PICTURES}/{name})' for text, name in there)} |"


def _numbers(before: HeldOut | None, after: HeldOut | None) -> str:
    """The rewards and the diversity before and after, as a section."""
    if after is None:
        return "## Results\n\nThis step was not evaluated."
    lines = ["| held-out prompts | base model | this model | change |", "|---|---|---|---|"]
    for name in held_out_rewards([after]):
        gain = gain_between(before, after, name) if before and before is not after else None
        change = show_gain(gain.mean, gain.standard_error) if gain else "–"
        lines.append(f"| reward `{name}` | {_mean(before, name)} | {_mean(after, name)} | {change} |")
    old, new = before.lpips if before else None, after.lpips
    change = show_gain(new - old) if old is not None and new is not None and before is not after else "–"
    lines.append(f"| diversity (mean pairwise LPIPS) | {show(old, new)} | {show(new, old)} | {change} |")
    told = (
        f"Means ± standard errors over {after.images} images of {len(after.prompts)} prompts that were not trained on"
    )
    return (
        "## Results\n\n" + "\n".join(lines) + f"\n\n{told}; the change is paired, over the same prompts and seeds. "
        "Diversity is the distance of two images of one prompt; its error was not recorded."
    )


def _mean(held: HeldOut | None, name: str) -> str:
    if held is None:
        return "–"
    mean, scores = held.rewards.get(name), held.scores(name)
    if not scores or mean is None:
        return show(mean)
    values = [torch.tensor([math.nan if one is None else one for one in group]) for group in scores]
    error = mean_over_images(values).standard_error
    return show(mean) if error is None else f"{show(mean)} ± {show(error, mean)}"


def _notes(config: Config, form: str, told: dict[str, Any]) -> str:
    notes = []
    gate, steps = gate_of(config), config.sampler.steps
    if gate and form == "merged":
        notes.append(
            f"The run's pictures above have a gate: the base model drew the first {gate} of {steps} steps. A merged "
            "model has none, and draws other pictures; the format diffusers keeps base model and tuning apart."
        )
    elif gate:
        notes.append(
            f"The base model draws the first {gate} of {steps} steps, as in training (`objective.gate`). Without the "
            "callback, what was tuned acts at every step, and the pictures differ from those above. `draftplus` reads "
            "the gate in the file itself."
        )
    replaced = [f"`model.{key}={public(getattr(config.model, key))}`" for key in ("denoiser", "vae")
                if getattr(config.model, key)]  # fmt: skip
    if replaced and form != "merged":
        notes.append(
            f"In training, parts of the base model were replaced ({', '.join(replaced)}); replace them here too, or "
            "export the format merged."
        )
    if form != "merged" and is_single_file(config.model.path):
        notes.append(
            "The base model is a single file, whose configurations diffusers reads from the hub; where they are gone, "
            "as those of Stable Diffusion 2.x are, `from_single_file` takes a diffusers directory as `config`."
        )
    if form == "merged":
        rounded = f", rounded to {told['dtype']} as the base model is stored" if told["dtype"] != "float32" else ""
        notes.append(f"The adapter was added in float32{rounded}. The pipeline has no safety checker.")
    if differs_from_stock(scheduler_config(config.model), config.sampler):
        notes.append(
            "The run sampled with DDIM and linspace spacing, in which draftplus and diffusers step to different noise "
            "levels on purpose, so the pictures differ from those above."
        )
    return " ".join(notes)


def _public_text(text: str, config: Config) -> str:
    return text.replace(config.model.path, str(public(config.model.path)))


def _settings(config: Config) -> str:
    default, named = flatten(to_dict(Config())), file_keys(config)
    lines = []
    for key, value in flatten(to_dict(config)).items():
        if key not in HERE and (key not in default or value != default[key]):
            shown = public(value) if key in named or ".args." in key else value
            lines.append(f"{key}={' '.join(setting(shown).split())}")
    return "\n".join(lines)
