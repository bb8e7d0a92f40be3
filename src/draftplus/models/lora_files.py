"""LoRA files of other hands: which file a path means, and its tensors as stock diffusers reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from draftplus.errors import UserError, first_line
from draftplus.models.nemo import read_adapter
from draftplus.weights import read_header, read_state_dict

LORA_FILE = LORA_WEIGHT_NAME_SAFE
PICKLES = (".bin", ".pt", ".pth", ".nemo")
NOT_LORA = ("scheduler", "optimizer", "checkpoint")  # in whose names stock diffusers looks for no adapter
KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}  # by part of a name
UP = re.compile(r"lora.*[._](B|up)\b.*weight$")  # in every spelling, what writes a layer's outputs
PART = re.compile(r"lora.*[._](A|B|up|down)\b.*weight$|alpha$")
# what peft can be told of an adapter besides ranks and scales, and the values that leave it a plain LoRA
PLAIN = {
    "use_dora": (None, False), "lora_bias": (None, False), "bias": (None, "none"), "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []), "init_lora_weights": (None, True, False, "gaussian"), "use_qalora": (None, False),
    "layer_replication": (None, []), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
}  # fmt: skip


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, as `load_lora_weights` reads it.

    state: the tensors, named as in diffusers, each network's after its name in the pipeline. alphas: kohya's, by the
    names that diffusers gives them. metadata: what its header says of the adapters; None: nothing.
    """

    file: Path
    state: Mapping[str, Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None

    def half(self, name: str, network: Any) -> dict[str, Tensor]:
        """The tensors of one network of the pipeline, by their names in it, in the spelling of peft."""
        return _spelled(name, network, {key: t for key, t in self.state.items() if key.startswith(f"{name}.")})

    def alphas_of(self, name: str, network: Any) -> dict[str, float]:
        """The alphas of one network of the pipeline, by the layer."""
        named = {key: alpha for key, alpha in (self.alphas or {}).items() if key.startswith(f"{name}.")}
        spelled = _spelled(name, network, named)
        return {key.partition(".lora_A")[0].removesuffix(".alpha"): alpha for key, alpha in spelled.items()}


def _spelled(name: str, network: Any, named: dict[str, Any]) -> dict[str, Any]:
    bare = {key.removeprefix(f"{name}."): value for key, value in named.items()}
    if bare and "lora_A" not in next(iter(bare)):
        if not name.startswith("text_encoder"):
            return dict(convert_unet_state_dict_to_peft(bare))
        if any("lora" in key for key in bare):
            bare = convert_state_dict_to_peft(convert_state_dict_to_diffusers(bare))
    if hasattr(network, "text_model"):
        return bare
    return {key.removeprefix("text_model."): value for key, value in bare.items()}


def lora_file(path: Path) -> Path | None:
    """The LoRA file that a path is, or the one in a directory; None where there is none.

    Raises UserError for a directory with several, of which stock diffusers would take any.
    """
    if path.is_file():
        return path if _holds_lora(path) else None
    if not path.is_dir() or (path / "model_index.json").is_file():
        return None
    for name in (LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME):
        if (path / name).is_file():
            return path / name
    for suffix in (".safetensors", ".bin"):
        found = sorted(file for file in path.glob(f"*{suffix}") if not any(part in file.name for part in NOT_LORA))
        found = [file for file in found if _holds_lora(file)]
        if len(found) > 1:
            raise UserError(
                f"{path} contains several adapters: {', '.join(file.name for file in found)}; give one file"
            )
        if found:
            return found[0]
    return None


def _holds_lora(file: Path) -> bool:
    """Whether a file is an adapter and not a model; a pickle, which models are not read from, by its name alone."""
    if file.suffix != ".safetensors":
        return file.suffix in PICKLES and not file.name.startswith(("diffusion_pytorch_model", "pytorch_model"))
    try:
        return any("lora" in name or any(kind in name for kind in KINDS) for name in read_header(file)[0])
    except UserError:
        return file.name == LORA_FILE  # which is damaged; reading it tells how


def read_lora(file: Path, pipeline: Any, config: Any = None) -> LoraFile:
    """Reads a LoRA file: safetensors, or a pickle of tensors alone, in any spelling that stock diffusers converts; or
    NeMo's.

    pipeline: the class of the stock pipeline that it is for. config: of that one's denoiser.

    Raises UserError for one that is damaged or would run code, that is no LoRA, or of a kind that is more than a LoRA.
    """
    if file.suffix == ".nemo":
        return LoraFile(file, *read_adapter(file, config), None)
    state = read_state_dict(file, tensors_only=True)
    metadata = _metadata(file)
    kind = next((told for name in state for part, told in KINDS.items() if part in name), None)
    if kind is not None:
        raise UserError(f"{file} is a {kind} adapter; only LoRA adapters are supported")
    for name, value in (metadata or {}).items():
        key = name.rpartition(".")[2]
        if key in PLAIN and value not in PLAIN[key]:
            raise UserError(f"{file}: its adapter has {key}={value!r}, which is more than a LoRA; it is not supported")
    try:
        found, alphas = _as_stock(pipeline, dict(state), config)
    except Exception as error:  # of names that diffusers has no place for
        raise UserError(f"{file}: the adapter cannot be read: {first_line(error)[:200]}") from None
    stray = next((name for name in found if "lora" not in name or name.endswith(".bias")), None)
    if stray is not None:
        raise UserError(f"{file}: the adapter does not fit this model: '{stray}' is not a part of a LoRA")
    lost = next((name for name, tensor in state.items() if not PART.search(name) and tensor.any()), None)
    if lost is not None and lost not in found:
        raise UserError(f"{file}: stock diffusers leaves out '{lost}', which is not a part of a LoRA")
    if _outputs(found) < _outputs(state):
        raise UserError(f"{file}: stock diffusers leaves out a part of the adapter, for which it has no layers")
    return LoraFile(file, found, alphas or None, metadata)


def _as_stock(pipeline: Any, state: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors under diffusers' names, and their alphas where these are not multiplied into them."""
    told = {"unet_config": config} if issubclass(pipeline, StableDiffusionXLLoraLoaderMixin) else {}
    found = pipeline.lora_state_dict(state, return_alphas=True, **told)
    return found if isinstance(found, tuple) else (found, None)


def _outputs(state: Mapping[str, Tensor]) -> int:
    """How many outputs of layers an adapter writes to; no conversion changes this, not of layers that are split."""
    return sum(len(tensor) for name, tensor in state.items() if UP.search(name) and tensor.any())


def _metadata(file: Path) -> dict[str, Any] | None:
    if file.suffix != ".safetensors":
        return None
    told = read_header(file)[1].get(LORA_ADAPTER_METADATA_KEY)
    try:
        read = json.loads(told) if told else None
    except ValueError:
        read = told
    if read is not None and not isinstance(read, dict):
        raise UserError(f"{file}: damaged: {LORA_ADAPTER_METADATA_KEY} in its header is not a JSON object")
    return read
