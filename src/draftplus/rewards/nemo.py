"""A reward of NeMo-Aligner, a CLIP in a `.nemo` file, as a transformers `CLIPModel` directory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftplus.errors import UserError
from draftplus.hub import by_hand
from draftplus.rewards.checkpoints import first, fit, locate
from draftplus.rewards.clip import CLIP_H, load_tokenizer
from draftplus.rewards.megatron import as_clip_model
from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from draftplus.weights import read_nemo_part, unpacked_nemo

# settings of a tower whose other values a `CLIPModel` has no place for
PLAIN: dict[str, tuple[Any, ...]] = {
    "normalization": ("layernorm", "LayerNorm"),
    "transformer_block_type": ("pre_ln",),
    "position_embedding_type": ("learned_absolute", "learned_parameters"),
    "class_token_length": (1,),
    "preprocess_layernorm": (True,),
    "global_average_pool": (False,),
    "layerscale": (False,),
    "num_channels": (3,),
}
ACTIVATIONS = {"gelu": "gelu", "approx-gelu": "quick_gelu"}


def convert_nemo(file: str | Path, output: str | Path, processor: str | None = None) -> Path:
    """Writes a `.nemo` file's CLIP as a `CLIPModel` directory in float32, with tokenizer and preprocessing. Returns it.

    processor: directory or hub id of the tokenizer; None: the one that the file names, if it is of the hub, else the
    one of CLIP ViT-H/14. The preprocessing is that of NeMo-Aligner's rewards: the shorter side to the network's size,
    bicubic, the centre, CLIP's mean and deviation.

    Raises UserError for a file that is damaged, would run code, or holds anything but a CLIP; for a tokenizer that is
    missing; and for an output directory with something in it.
    """
    file, output = Path(file).expanduser(), Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"-o '{output}' exists and is not an empty directory; give another")
    with unpacked_nemo(file) as (config, parts):
        _check(str(file), config)
        tokenizer = _tokenizer(processor or _named_tokenizer(config))
        tensors = as_clip_model([read_nemo_part(file, part) for part in parts], config, str(file))
    model = _model(file, config, tensors)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the network in '{file}' knows "
            f"{model.config.text_config.vocab_size}; give the one that it was trained with as --processor"
        )
    _write(model, tokenizer, output)
    return output


def _check(file: str, config: dict[str, Any]) -> None:
    """Raises UserError for the configuration of another model than a CLIP, or of one that a `CLIPModel` cannot be."""
    if not all(isinstance(config.get(tower), dict) for tower in ("vision", "text")):
        target = str(config.get("target", "something else")).rpartition(".")[2]
        adapter = "peft" in config or "unet_config" in config
        hint = "; a tuned diffusion model is not a reward, see docs/from-nemo-aligner.md" if adapter else ""
        raise UserError(f"'{file}' holds {target}, not a CLIP with its towers vision and text{hint}")
    if config.get("use_siglip"):
        raise UserError(f"'{file}' holds a SigLIP, which is not a CLIPModel")
    for tower in ("vision", "text"):
        settings = config[tower]
        for key, values in PLAIN.items():
            value = settings.get(key)
            if value is not None and value not in values:
                raise UserError(f"'{file}' has {tower}.{key} {value}, which a CLIPModel cannot have, only {values[0]}")
        for key in ("hidden_size", "num_layers", "ffn_hidden_size", "num_attention_heads"):
            _number(file, settings, tower, key)
        settings["layernorm_epsilon"] = _epsilon(file, tower, settings.get("layernorm_epsilon", 1e-5))
        width = settings["hidden_size"] // settings["num_attention_heads"]
        if settings.get("kv_channels") not in (None, width):
            raise UserError(f"'{file}' has {tower}.kv_channels {settings['kv_channels']}, not the {width} of CLIPModel")
        if not settings.get("openai_gelu") and settings.get("activation", "gelu") not in ACTIVATIONS:
            raise UserError(f"'{file}' has {tower}.activation {settings['activation']}, not {' or '.join(ACTIVATIONS)}")
    if _number(file, config["vision"], "vision", "img_h") != _number(file, config["vision"], "vision", "img_w"):
        raise UserError(f"'{file}' is for images that are not square, which a CLIPModel cannot take")
    _number(file, config["vision"], "vision", "patch_dim")


def _number(file: str, settings: Mapping[str, Any], tower: str, key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"'{file}': model_config.yaml in it has {tower}.{key} {value}, where a number above 0 is expected"
        )
    return value


def _epsilon(file: str, tower: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"'{file}' has {tower}.layernorm_epsilon {value}, where a number is expected") from None


def _named_tokenizer(config: Mapping[str, Any]) -> str:
    named = config.get("tokenizer") or {}
    of_hub = named.get("library") == "huggingface" and named.get("type")
    return str(named["type"]) if of_hub else CLIP_H


def _tokenizer(source: str) -> Any:
    try:
        return load_tokenizer(locate(source), None)
    except UserError as error:
        reason = first(error).partition(": set args")[0].rstrip(".").replace("reward weights", "the tokenizer of")
        by_hub = "" if Path(source).expanduser().exists() else f".\nRun: {by_hand(source, key='--processor')}"
        raise UserError(f"{reason}; give a directory that has the tokenizer as --processor{by_hub}") from error


def _model(file: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    from transformers import CLIPConfig, CLIPModel

    def rows(name: str) -> int:
        if name not in tensors:
            raise UserError(f"'{file}' has no {name} (in transformers' names), so it is not a whole CLIP")
        return len(tensors[name])

    # the vocabulary is padded and the projection's width may be a reference to another key: both are in the weights
    text = {
        **_tower(config["text"]), "vocab_size": rows("text_model.embeddings.token_embedding.weight"),
        "max_position_embeddings": rows("text_model.embeddings.position_embedding.weight"),
        "bos_token_id": 0, "pad_token_id": 1,
        "eos_token_id": 2,  # with which the class takes the features at the highest token, as NeMo does
    }  # fmt: skip
    vision = {
        **_tower(config["vision"]), "image_size": config["vision"]["img_h"], "patch_size": config["vision"]["patch_dim"]
    }  # fmt: skip
    made = CLIPConfig(text_config=text, vision_config=vision, projection_dim=rows("text_projection.weight"))
    return fit(lambda: CLIPModel(made), tensors, f"'{file}'", torch.float32)


def _tower(settings: Mapping[str, Any]) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh" if settings.get("openai_gelu") else ACTIVATIONS[settings.get("activation", "gelu")]
    return {
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["ffn_hidden_size"],
        "num_hidden_layers": settings["num_layers"],
        "num_attention_heads": settings["num_attention_heads"],
        "layer_norm_eps": settings["layernorm_epsilon"],
        "hidden_act": activation,
    }


def _write(model: Any, tokenizer: Any, output: Path) -> None:
    """All at once: an interrupted conversion leaves no directory that looks whole."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        whole = Path(scratch) / "clip"
        for part in (model, tokenizer, processor):
            part.save_pretrained(whole)
        if output.exists():
            output.rmdir()
        whole.rename(output)
