"""LoRA files of other trainers, in the spellings that the stock pipeline of a family converts, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from draftplus.errors import UserError
from tests.families.cases import CASES, load_model, stock_pipe
from tests.families.conftest import Saved
from tests.families.test_adapters import ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
RANK = 3
DOWN_UP, A_B = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
PEFT = (".lora_A.default.weight", ".lora_B.default.weight")

State = dict[str, Tensor]
Layers = dict[str, list[str]]  # a name in the file -> the layers of the stock network that it is for


def lora(network: Any, layers: Layers, parts: tuple[str, str], alpha: float | None = None) -> State:
    """Random adapters; where a name is for several layers, these are one in the file."""
    generator, state = torch.Generator().manual_seed(1), {}
    for name, targets in layers.items():
        weights = [network.get_submodule(target).weight for target in targets]
        down = torch.randn(RANK, weights[0].shape[1], generator=generator)
        up = torch.randn(sum(len(weight) for weight in weights), RANK, generator=generator)
        state |= {name + parts[0]: 0.3 * down, name + parts[1]: 0.3 * up}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def text(network: Any, prefix: str, parts: tuple[str, str], alpha: float | None = None, sign: str = "_") -> State:
    """Of the first layer of a CLIP text encoder."""
    layers = {}
    for layer in ("q_proj", "v_proj", "out_proj"):
        target = f"encoder.layers.0.self_attn.{layer}"
        nested = f"text_model.{target}"
        layers[prefix + nested.replace(".", sign)] = [nested if hasattr(network, "text_model") else target]
    return lora(network, layers, parts, alpha)


def attention(block: str, *names: str) -> list[str]:
    return [f"{block}.attn.{name}" for name in names]


def fused(sign: str, prefix: str) -> Layers:
    """The attention of double blocks, as FLUX itself has it: q, k and v are one layer."""
    block, layers = "transformer_blocks.1", {}
    for name, targets in {
        "img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "img_attn.proj": ("to_out.0",), "txt_attn.proj": ("to_add_out",),
    }.items():  # fmt: skip
        layers[prefix + f"double_blocks.1.{name}".replace(".", sign)] = attention(block, *targets)
    return layers


def flux_kohya(pipe: Any) -> State:
    layers = {
        **fused("_", "lora_unet_"), "lora_unet_double_blocks_0_img_mlp_0": ["transformer_blocks.0.ff.net.0.proj"],
        "lora_unet_single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
    }  # fmt: skip
    return lora(pipe.transformer, layers, DOWN_UP, 1.5) | text(pipe.text_encoder, "lora_te1_", DOWN_UP, 6.0)


def flux_comfy(pipe: Any) -> State:
    return lora(pipe.transformer, fused(".", "diffusion_model."), DOWN_UP, 1.5)


def flux_xlabs(pipe: Any) -> State:
    double, single = "transformer_blocks.0", "single_transformer_blocks.1"
    layers = {
        "double_blocks.0.processor.qkv_lora1": attention(double, "to_q", "to_k", "to_v"),
        "double_blocks.0.processor.qkv_lora2": attention(double, "add_q_proj", "add_k_proj", "add_v_proj"),
        "double_blocks.0.processor.proj_lora1": attention(double, "to_out.0"),
        "double_blocks.0.processor.proj_lora2": attention(double, "to_add_out"),
        "single_blocks.1.processor.qkv_lora": attention(single, "to_q", "to_k", "to_v"),
    }
    return lora(pipe.transformer, layers, (".down.weight", ".up.weight"))


def flux_onetrainer(pipe: Any) -> State:
    targets = attention("transformer_blocks.0", "to_q", "add_k_proj", "to_out.0")
    layers = {f"lora_transformer_{target.replace('.', '_')}": [target] for target in targets}
    return lora(pipe.transformer, layers, DOWN_UP, 6.0)


def flux_alphas(pipe: Any) -> State:
    targets = ["transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out"]
    return lora(pipe.transformer, {f"transformer.{target}": [target] for target in targets}, A_B, 1.5)


def flux2(pipe: Any, sign: str, prefix: str, parts: tuple[str, str], alpha: float | None = None) -> State:
    layers = {**fused(sign, prefix), f"{prefix}double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.linear_out"]}
    for name, target in (("linear1", "to_qkv_mlp_proj"), ("linear2", "to_out")):
        layers[f"{prefix}single_blocks.1.{name}"] = attention("single_transformer_blocks.1", target)
    spelled = {prefix + name.removeprefix(prefix).replace(".", sign): targets for name, targets in layers.items()}
    return lora(pipe.transformer, spelled, parts, alpha)


def sdxl_kohya(pipe: Any) -> State:
    target = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    state = lora(pipe.unet, {f"lora_unet_{target.replace('.', '_')}": [target]}, DOWN_UP, 1.5)
    state |= text(pipe.text_encoder, "lora_te1_", DOWN_UP, 1.5)
    return state | text(pipe.text_encoder_2, "lora_te2_", DOWN_UP, 1.5)


def sdxl_original(pipe: Any) -> State:
    """Stability's own names for the blocks."""
    target = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    return lora(pipe.unet, {name: [target]}, DOWN_UP, 1.5)


def sd3_text(pipe: Any) -> State:
    target = "transformer_blocks.0.attn.to_q"
    state = lora(pipe.transformer, {f"transformer.{target}": [target]}, A_B)
    state |= text(pipe.text_encoder, "text_encoder.", A_B, sign=".")
    return state | text(pipe.text_encoder_2, "text_encoder_2.", A_B, sign=".")


def attention_of(blocks: str, prefix: str, sign: str, *names: str) -> Layers:
    """Layers of the attention of some block, in the names of diffusers."""
    targets = [f"{blocks}.{name}" for name in names]
    return {prefix + target.replace(".", sign): [target] for target in targets}


def qwen_image(pipe: Any, prefix: str, sign: str, parts: tuple[str, str], alpha: float | None = None) -> State:
    names = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out", "img_mlp.net.2", "txt_mod.1")
    return lora(pipe.transformer, attention_of("transformer_blocks.0", prefix, sign, *names), parts, alpha)


def z_image(
    pipe: Any, prefix: str, sign: str, parts: tuple[str, str], alpha: float | None = None, out: str = "to_out.0"
) -> State:
    names, layers = ("attention.to_q", "attention.to_out.0", "feed_forward.w2"), {}
    for blocks in ("layers.1", "noise_refiner.0", "context_refiner.0"):
        layers |= attention_of(blocks, prefix, sign, *names)
    spelled = {name.replace(f"to_out{sign}0", out): targets for name, targets in layers.items()}
    return lora(pipe.transformer, spelled, parts, alpha)


SPELLINGS: dict[str, tuple[str, Callable[[Any], State]]] = {
    "flux kohya": ("flux_dev", flux_kohya),
    "flux comfy": ("flux_dev", flux_comfy),
    "flux xlabs": ("flux_dev", flux_xlabs),
    "flux onetrainer": ("flux_dev", flux_onetrainer),
    "flux alphas": ("flux_dev", flux_alphas),
    "flux2 kohya": ("flux2_klein_base", lambda pipe: flux2(pipe, "_", "lora_unet_", DOWN_UP, 1.5)),
    "flux2 ai-toolkit": ("flux2_klein_base", lambda pipe: flux2(pipe, ".", "diffusion_model.", A_B)),
    "flux2 peft": ("flux2_klein_base", lambda pipe: flux2(pipe, ".", "base_model.model.", A_B)),
    "sdxl kohya": ("sdxl", sdxl_kohya),
    "sdxl original": ("sdxl", sdxl_original),
    "sd3 text": ("sd3", sd3_text),
    "qwen kohya": ("qwen_image", lambda pipe: qwen_image(pipe, "lora_unet_", "_", DOWN_UP, 1.5)),
    "qwen comfy": ("qwen_image", lambda pipe: qwen_image(pipe, "diffusion_model.", ".", A_B)),
    "qwen lightning": ("qwen_image", lambda pipe: qwen_image(pipe, "", ".", DOWN_UP, 6.0)),
    "qwen diffsynth": ("qwen_image", lambda pipe: qwen_image(pipe, "", ".", PEFT)),
    "z-image kohya": ("zimage", lambda pipe: z_image(pipe, "lora_unet_", "_", DOWN_UP, 1.5, "to_out_0")),
    "z-image comfy": ("zimage", lambda pipe: z_image(pipe, "diffusion_model.", ".", DOWN_UP, 6.0, "out")),
    "z-image ai-toolkit": ("zimage", lambda pipe: z_image(pipe, "diffusion_model.", ".", A_B)),
    "z-image diffsynth": ("zimage", lambda pipe: z_image(pipe, "", ".", PEFT)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_picture_is_that_of_stock(saved: Saved, tmp_path: Path, spelling: str) -> None:
    name, make = SPELLINGS[spelling]
    pipe = stock_pipe(saved(name))
    save_file(make(pipe), tmp_path / "x.safetensors")
    untuned = theirs(CASES[name], pipe)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    picture = ours(CASES[name], saved(name), tmp_path / "x.safetensors")
    assert (picture - untuned).abs().max() > 1e-2
    assert (picture - theirs(CASES[name], pipe)).abs().max() < 1e-3


def of_t5(pipe: Any) -> State:
    name = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    return flux_comfy(pipe) | lora(pipe.text_encoder_2, {name: ["encoder.block.0.layer.0.SelfAttention.q"]}, DOWN_UP)


def of_t5_in_diffusers_names(pipe: Any) -> State:
    target = "encoder.block.0.layer.0.SelfAttention.q"
    return flux_alphas(pipe) | lora(pipe.text_encoder_2, {f"text_encoder_2.{target}": [target]}, A_B)


def with_biases(pipe: Any) -> State:
    return flux_kohya(pipe) | {"lora_unet_double_blocks_1_img_attn_proj.diff_b": torch.ones(32)}


def of_a_layer_that_loses_its_name(pipe: Any) -> State:
    """The stock conversion of OneTrainer's names gives all layers of a feed-forward part one name."""
    targets = ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2")
    layers = {f"lora_transformer_{target.replace('.', '_')}": [target] for target in targets}
    return lora(pipe.transformer, layers, DOWN_UP, 1.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (of_t5, "leaves out a part of the adapter"),
        (of_t5_in_diffusers_names, "text_encoder_2.encoder.*none of its networks, transformer, text_encoder"),
        (with_biases, "leaves out 'lora_unet_double_blocks_1_img_attn_proj.diff_b'"),
        (of_a_layer_that_loses_its_name, "leaves out a part of the adapter"),
    ],
)
def test_what_stock_drops_is_refused(saved: Saved, tmp_path: Path, make: Callable[[Any], State], says: str) -> None:
    save_file(make(stock_pipe(saved("flux_dev"))), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=says) as told:
        load_model(saved("flux_dev"), trainable=False).tuned.load(tmp_path / "x.safetensors")
    assert len(str(told.value).splitlines()) == 1
