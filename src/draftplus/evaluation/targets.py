"""What `evaluate` compares: models, runs and their steps, distinguished by hashes of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from draftplus import __version__
from draftplus.config import Config, ModelConfig, load_config
from draftplus.errors import UserError
from draftplus.evaluation.knobs import TUNED, Knobs
from draftplus.models.lora_files import lora_file
from draftplus.runs.checksums import files_hash, text_hash
from draftplus.runs.directory import is_run
from draftplus.runs.inputs import model_hashes
from draftplus.runs.weights import find_weights, intact

BASE = "base"


@dataclass(frozen=True)
class Target:
    """Something to make images with, as the user named it.

    run, step: where it is from; None for a model, and for an unknown step. adapter: its trained weights; None: the base
    model. model_hash, adapter_hash: of the files.
    """

    name: str
    label: str
    config: Config
    run: Path | None
    step: int | None
    adapter: Path | None
    knobs: Knobs
    model_hash: str
    adapter_hash: str | None

    @property
    def hash(self) -> str:
        """Of everything that decides its image of a prompt and a seed, except the last bits, which a device decides."""
        told = {
            "model": self.model_hash, "dtype": self.config.model.dtype, "adapter": self.adapter_hash,
            "sampler": asdict(self.config.sampler), **asdict(self.knobs), "version": __version__,
            **({"vae_tiling": True} if self.config.model.vae_tiling else {}),
            **({"quantize": self.config.model.quantize} if self.config.model.quantize else {}),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def find_targets(names: Sequence[str], overrides: Sequence[str], knobs: Knobs) -> list[Target]:
    """The targets by name, in order and each once; the base model is added first if it is not among them.

    overrides: `key=value`, over every run's own configuration. The knobs act on targets with trained weights. A model
    or an adapter by itself has no settings, and is sampled as the first run is.

    Raises UserError for targets that do not exist, cannot be compared (other base models, other sampler settings), or
    have nothing that a knob could act on.
    """
    distinct = list(dict.fromkeys(names))
    if not distinct:
        raise UserError("no target given; name a model or a run, such as runs/demo")
    runs = [name for name in distinct if _run_of(name) is not None]
    leaders = [_inside_run(name) for name in runs] or [name for name in distinct if not _is_adapter(Path(name))]
    settings = find_weights(leaders[0], overrides).config if leaders else None
    targets = [_find(name, overrides, knobs, settings) for name in distinct]
    first = next((target for target in targets if target.name in runs), targets[0])
    if knobs != TUNED and all(target.adapter is None for target in targets):
        raise UserError(f"'{targets[0].name}' has no trained weights to scale or anneal; name a run")
    knobs.check()
    for target in targets:
        _refuse_other(target, first)
    if all(target.adapter is not None for target in targets):
        model = first.config.model.path
        targets.insert(0, Target(model, BASE, first.config, None, None, None, TUNED, first.model_hash, None))
    labels = [target.label for target in targets]  # labels name the directories of pictures, so no two may be the same
    return [replace(t, label=t.name) if labels.count(t.label) > 1 else t for t in targets]


def _find(name: str, overrides: Sequence[str], knobs: Knobs, settings: Config | None) -> Target:
    run, path = _run_of(name), Path(name)
    if run is None and not _is_adapter(path):
        weights = find_weights(name, overrides)  # its own model, sampled as the others are
        config = weights.config
        if settings is not None:
            given = {key: getattr(settings.model, key) for key in ("dtype", "vae_tiling", "quantize")}
            config = replace(settings, model=replace(config.model, **given))
        return Target(name, weights.label, config, None, None, None, TUNED, model_hash(config.model), None)
    if _is_adapter(path):
        config = settings or find_weights(load_config(None, list(overrides)).model.path, overrides).config
        adapter, label = intact(path), path.resolve().name if run is None else f"{run.name}/{path.name}"
    else:
        weights = find_weights(name, overrides)
        assert weights.adapter is not None
        config, adapter, label = weights.config, weights.adapter, weights.label
    if run is not None:
        config = find_weights(_inside_run(name), overrides).config
    if run is not None and config.model.lora is None and knobs.lora_scale != 1:
        raise UserError(
            f"'{name}' is a fully fine-tuned denoiser, which has no LoRA scale; use anneal instead, such as linear"
        )
    holder = adapter if adapter.is_dir() else adapter.parent
    step = holder.name.removeprefix("step-") if run is not None else ""
    return Target(
        name, f"{label} {knobs.label}".strip(), config, run, int(step) if step.isdigit() else None, adapter, knobs,
        model_hash(config.model), files_hash(adapter),
    )  # fmt: skip


def _run_of(name: str) -> Path | None:
    """The run of a target that is a run, one of its steps, or one of its adapter directories."""
    for one in (name, name.rpartition("@")[0]):
        if one and is_run(one):
            return Path(one)
    path = Path(name)
    return next((up for up in list(path.parents)[:3] if _is_adapter(path) and is_run(up)), None)


def _inside_run(name: str) -> str:
    return str(_run_of(name)) if _is_adapter(Path(name)) else name


def _is_adapter(path: Path) -> bool:
    """Whether a path is what a model's `tuned.load` reads: a LoRA file, or the directory of one or of a denoiser."""
    if lora_file(path) is not None:
        return True
    denoiser = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return denoiser and not (path / "model_index.json").is_file()


def _refuse_other(target: Target, first: Target) -> None:
    if _base(target) != _base(first):
        models = [one.config.model for one in (first, target)]
        both = [f"{model.path} in {model.quantize or model.dtype}{', tiled' * model.vae_tiling}" for model in models]
        raise UserError(
            f"'{first.name}' and '{target.name}' have different base models ({' and '.join(both)}), so their "
            "numbers are not comparable; evaluate each one separately"
        )
    mine, theirs = asdict(target.config.sampler), asdict(first.config.sampler)
    for key in mine:
        if mine[key] != theirs[key]:
            raise UserError(
                f"'{first.name}' samples with sampler.{key}={theirs[key]}, but '{target.name}' with {mine[key]}; "
                f"set one value for all, such as sampler.{key}={theirs[key]}"
            )


def _base(target: Target) -> tuple[str, str, bool, str | None]:
    model = target.config.model
    return target.model_hash, model.dtype, model.vae_tiling, model.quantize


def model_hash(config: ModelConfig) -> str:
    """The SHA-256 of a base model, by its files that are loaded. Raises UserError for a model that is missing."""
    return text_hash(model_hashes(config))
