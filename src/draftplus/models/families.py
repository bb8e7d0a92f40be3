"""Which family a model is of, and how it is sampled where nothing is asked for; known before any network is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from draftplus.config import Config, ModelConfig, nearest
from draftplus.errors import UserError, first_line
from draftplus.hub import by_hand, why_offline
from draftplus.models.paths import directory_of, is_single_file, looks_local

ASSETS = Path(str(files("draftplus"))) / "assets"


@dataclass(frozen=True)
class Family:
    """A family of models.

    load: where its loader is, as module:function. It takes (model configuration, path, device, seed, trainable), the
    first three by position. sampler: what its stock pipeline does where a key of `sampler` is null. denoiser: its class
    in diffusers. scale: what the stock pipeline calls `sampler.guidance_scale`.
    """

    load: str
    sampler: Mapping[str, Any]
    denoiser: str = "UNet2DConditionModel"
    scale: str = "guidance_scale"

    @property
    def component(self) -> str:
        """The denoiser's name in the stock pipeline."""
        return "unet" if self.denoiser.startswith("UNet") else "transformer"


# built-in name -> directory
MODELS = {"emoji": ASSETS / "emoji"}

# built-in name -> its defaults for `sampler` keys that are null; they come before those of its family
SAMPLING = {"emoji": {"steps": 10, "guidance_scale": 1.75}}

# diffusers pipeline class, as model_index.json names it -> family
FAMILIES = {
    "StableDiffusionPipeline": Family(
        "draftplus.models.stable_diffusion:load", {"steps": 50, "guidance_scale": 7.5, "negative_prompt": ""}
    ),
    "StableDiffusionXLPipeline": Family("draftplus.models.sdxl:load", {"steps": 50, "guidance_scale": 5.0}),
    "StableDiffusion3Pipeline": Family(
        "draftplus.models.sd3:load", {"steps": 28, "guidance_scale": 7.0}, "SD3Transformer2DModel"
    ),
    "FluxPipeline": Family(
        "draftplus.models.flux:load", {"steps": 28, "guidance_scale": 3.5}, "FluxTransformer2DModel"
    ),
    "ChromaPipeline": Family(
        "draftplus.models.chroma:load", {"steps": 35, "guidance_scale": 5.0}, "ChromaTransformer2DModel"
    ),
    "Flux2KleinPipeline": Family(
        "draftplus.models.flux2:load", {"steps": 50, "guidance_scale": 4.0}, "Flux2Transformer2DModel"
    ),
    "QwenImagePipeline": Family(
        "draftplus.models.qwen_image:load",
        {"steps": 50, "guidance_scale": 4.0},
        "QwenImageTransformer2DModel",
        scale="true_cfg_scale",
    ),
    "ZImagePipeline": Family(
        "draftplus.models.z_image:load", {"steps": 50, "guidance_scale": 5.0}, "ZImageTransformer2DModel"
    ),
}


def model_path(config: ModelConfig) -> str:
    """The directory, file or hub id of a model.

    Raises UserError for a path that is neither a built-in name nor can be any of these.
    """
    path = str(MODELS.get(config.path, config.path))
    if "/" not in path and not Path(path).exists():
        near = nearest(path, list(MODELS))
        raise UserError(f"model.path '{path}': no such built-in model, file or directory; {near or 'built in: emoji'}")
    return path


def family_of(config: ModelConfig) -> Family:
    """The family of a model: that of the pipeline class which its model_index.json names.

    Raises UserError if it is missing, or draftplus has no such family.
    """
    return FAMILIES[index_of(config)["_class_name"]]


def index_of(config: ModelConfig) -> Mapping[str, Any]:
    """A model's model_index.json; of a single file its `_class_name` alone. Raises UserError as `family_of` does."""
    path, revision = os.path.expanduser(model_path(config)), config.revision
    if is_single_file(path):
        from draftplus.models import single_file  # torch, which other models need not to be known

        return {"_class_name": single_file.pipeline_class(config, path)}
    if looks_local(path) or Path(path).is_dir():
        index = Path(directory_of(path)) / "model_index.json"
    else:
        found = hub_index(path, revision)
        if not isinstance(found, Path):
            if _is_cached(path, "unet/config.json", revision):  # by version 0.1, which never fetched the index
                return {"_class_name": "StableDiffusionPipeline"}
            raise UserError(found)
        index = found
    try:
        told: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        name = str(told["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a diffusers model index") from None
    if name not in FAMILIES:
        raise UserError(f"model.path '{path}' is a {name}, which is not supported; supported: {', '.join(FAMILIES)}")
    return told


@lru_cache
def hub_index(path: str, revision: str | None) -> Path | str:
    """The model_index.json of a hub id, the only file that is fetched of it; if there is none, why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = why_offline()
    try:
        return Path(hf_hub_download(path, "model_index.json", revision=revision))
    except Exception as error:  # the hub's, the network's and the disk's errors have no base class in common
        if offline is not None and isinstance(error, LocalEntryNotFoundError):
            return (
                f"model.path '{path}': it is neither on this disk nor in the hub's cache, and {offline}; "
                f"{by_hand(path, revision)}"
            )
        return (
            f"model.path '{path}': no model_index.json: {first_line(error)} (a model that is not on this disk is read "
            "from the hub, which needs the network or an earlier download)"
        )


def _is_cached(path: str, name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, name, revision=revision), str)


def resolve(config: Config) -> Config:
    """The configuration with those nulls filled in that the model decides."""
    given = {**family_of(config.model).sampler, **SAMPLING.get(config.model.path, {})}
    if config.sampler.sigmas is not None:
        given["steps"] = len(config.sampler.sigmas)
    absent = {key: value for key, value in given.items() if getattr(config.sampler, key) is None}
    return replace(config, sampler=replace(config.sampler, **absent)) if absent else config
