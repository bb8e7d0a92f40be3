"""One file in the original layout, without the hub: which configurations it gets, and what is refused by name."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
    infer_diffusers_model_type,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from draftplus import api, errors
from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models import single_file
from draftplus.models.stable_diffusion import StableDiffusion, load
from tests.support.ldm import as_single_file, unet_as_ldm, vae_as_ldm
from tests.tiny import CPU, save_tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def tensors(tiny_path: Path) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in as_single_file(tiny_path).items()}


def loaded(path: Path, **settings: Any) -> StableDiffusion:
    return load(ModelConfig(path=str(path), **settings), str(path), CPU, trainable=False, dtype=torch.float64)


def assert_same(found: StableDiffusion, expected: StableDiffusion, *parts: str) -> None:
    for part in parts or ("unet", "vae", "text_encoder"):
        a, b = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), part


def refused(path: Path, says: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        loaded(path, **settings)
    assert says in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
def test_a_single_file_draws_the_directorys_picture(
    tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name.endswith(".ckpt"):
        torch.save({"state_dict": tensors, "global_step": 3}, file)
    else:
        save_file(tensors, file)
    settings = ["device=cpu", "sampler.steps=3"]
    expected = api.generate(str(tiny_path), ["a cat"], [1], settings)
    found = api.generate(str(file), ["a cat"], [1], [*settings, f"model.config={tiny_path}"])
    assert torch.equal(found, expected) and expected.std() > 0.01


def test_the_text_encoder_of_the_second_version(tiny_path: Path, tmp_path: Path) -> None:
    """OpenCLIP's names, its three matrices in one, and a last layer that is not used."""
    save_file({name: t.clone() for name, t in as_single_file(tiny_path, 2).items()}, tmp_path / "m.safetensors")
    assert_same(loaded(tmp_path / "m.safetensors", config=str(tiny_path)), tiny_model(tiny_path, trainable=False))


def test_replaced_parts_of_a_single_file(tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    other = save_tiny(tmp_path / "other", seed=5)
    made = loaded(tmp_path / "m.safetensors", config=str(tiny_path), denoiser=str(other / "unet"))
    assert_same(made, tiny_model(other, trainable=False), "unet")
    assert_same(made, tiny_model(tiny_path, trainable=False), "vae", "text_encoder")


def test_keys_that_do_not_go_together(tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(tensors, file)
    refused(file, "model.revision does not apply to a single file", config=str(tiny_path), revision="main")
    refused(file, "model.variant does not apply to a single file", config=str(tiny_path), variant="fp16")
    refused(file, "model.config '/no/where': no unet/config.json in it", config="/no/where")
    refused(file, "or one of sd1, sd2, sd2-base", config="/no/where")
    refused(tiny_path, "model.config is for single files", config="sd1")
    refused(file, "cannot be loaded")  # the package's configurations are of the true size


def test_a_file_that_lacks_a_part(tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for prefix in ("model.", "first_stage_model.decoder.mid", "cond_stage_model."):
        file = tmp_path / f"{prefix.rstrip('.')}.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}, file)
        refused(file, "cannot be loaded", config=str(tiny_path))
    unet = tmp_path / "unet.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("first")}, unet)
    refused(unet, "it has no UNet in the original layout")


# of each family, the tensors by which diffusers knows it
FAMILIES = {
    "stable-diffusion-xl-1.0-inpainting": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,),
    },
    "stable-diffusion-xl-refiner-1.0": {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1,)},
    "stable-diffusion-3-medium": {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "model.diffusion_model.pos_embed": (1, 36864, 1536),
    },
    "stable-diffusion-3.5-large": {"model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": (1,)},
    "FLUX.1-schnell": {"double_blocks.0.img_attn.norm.key_norm.scale": (1,)},
    "stable-diffusion-inpainting": {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)},
    "stable-diffusion-2-inpainting": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    },
    "instruct-pix2pix": {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)},
    "control_v11p_sd15_canny": {"control_model.time_embed.0.weight": (1,)},
    "unCLIP": {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.label_emb.0.0.weight": (1,),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_another_family_is_named(tmp_path: Path, family: str, ending: str) -> None:
    state = {name: torch.zeros(1).expand(shape) for name, shape in FAMILIES[family].items()}
    file = tmp_path / f"m.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": state}, file)
    else:
        save_file({name: tensor.to(torch.int8).contiguous() for name, tensor in state.items()}, file)
    refused(file, family)
    refused(file, "is not supported")


def test_the_configuration_follows_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors.notice.cache_clear()
    two = {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 1024)}
    one = {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 768)}

    def chosen(state: dict[str, Tensor], says: str = "", **settings: Any) -> str:
        save_file(state, tmp_path / "m.safetensors", metadata={"modelspec.architecture": says} if says else None)
        return single_file.source(ModelConfig(**settings), str(tmp_path / "m.safetensors")).directory.name

    assert chosen(one) == "sd1"
    assert chosen(two, "stable-diffusion-v2-512") == "sd2-base"
    assert chosen(two, "stable-diffusion-v2-768-v") == chosen(two, config="sd2") == "sd2"
    assert chosen(two, config="sd2-base") == "sd2-base"
    assert capsys.readouterr().err == ""
    assert chosen(two) == "sd2"
    assert "predicts v at 768 pixels" in capsys.readouterr().err


def original(version: int) -> dict[str, Any]:
    """The facts of CompVis' v1-inference.yaml and Stability's v2-inference-v.yaml that diffusers reads."""
    unet = {
        "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "transformer_depth": 1, "use_checkpoint": True,
        **({"num_heads": 8, "context_dim": 768} if version == 1 else
           {"num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}),
    }  # fmt: skip
    vae = {"z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
           "num_res_blocks": 2}  # fmt: skip
    parts = {"unet_config": {"params": unet}, "first_stage_config": {"params": {"ddconfig": vae, "embed_dim": 4}}}
    return {"model": {"params": {**parts, "scale_factor": 0.18215}}}


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "version", "kind", "unet_size", "text_size"),
    [
        ("sd1", 1, "v1", 859_520_964, 123_060_480),
        ("sd2", 2, "v2", 865_910_724, 340_387_840),
        ("sd2-base", 2, "v2", 865_910_724, 340_387_840),
    ],
)
def test_the_configurations_are_those_of_the_published_models(
    name: str, version: int, kind: str, unet_size: int, text_size: int
) -> None:
    """By the published numbers of parameters, diffusers' own conversion of the original settings, and the names."""
    directory = single_file.CONFIGS / name
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(directory, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(directory, subfolder="vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(directory, subfolder="text_encoder"))
    assert (numbers(unet), numbers(vae), numbers(text)) == (unet_size, 83_653_863, text_size)
    assert text.config.hidden_act == ("quick_gelu" if version == 1 else "gelu")

    state = {**unet_as_ldm(unet.state_dict(), 2, 4), **vae_as_ldm(vae.state_dict(), 4)}
    assert infer_diffusers_model_type(state) == kind
    back = convert_ldm_unet_checkpoint(state, dict(unet.config))
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in unet.state_dict().items()}
    back = convert_ldm_vae_checkpoint(state, dict(vae.config))
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in vae.state_dict().items()}

    size = {"sd1": 512, "sd2": 768, "sd2-base": 512}[name]
    made = create_unet_diffusers_config_from_ldm(original(version), state)
    made |= {"sample_size": size // 8, "attention_head_dim": made["attention_head_dim"]}
    full = UNet2DConditionModel.from_config
    with torch.device("meta"):
        expected = full({key: value for key, value in made.items() if value is not None}).config
    differing = {key for key in expected if expected[key] != unet.config[key]} - {"_use_default_values"}
    assert differing == (set() if version == 1 else {"upcast_attention"})  # which changes nothing in float32
    told = create_vae_diffusers_config_from_ldm(original(version), state)
    assert all(list(told[key]) == list(vae.config[key]) for key in ("block_out_channels", "down_block_types"))
    assert vae.config.scaling_factor == 0.18215

    scheduler = json.loads((directory / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == ("v_prediction" if name == "sd2" else "epsilon")
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["steps_offset"]) == (0.00085, 0.012, 1)


@pytest.mark.parametrize(("name", "pad"), [("sd1", 49407), ("sd2", 0), ("sd2-base", 0)])
def test_the_tokenizer_is_clips(name: str, pad: int, tmp_path: Path) -> None:
    made = single_file.tokenizer(single_file.CONFIGS / name)
    known = {"a photo of a cat": [320, 1125, 539, 320, 2368], "Hello World": [3306, 1002], "a diagram": [320, 22697],
             "a dog": [320, 1929], "": []}  # fmt: skip
    for text, ids in known.items():
        found = made(text, padding="max_length", truncation=True).input_ids
        assert found == [49406, *ids, 49407, *[pad] * (75 - len(ids))], text
    assert (len(made), made.model_max_length) == (49408, 77)
    made.save_pretrained(tmp_path)
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("A naïve café — 東京, 🐱!", "it's 42% of <|endoftext|> x"):
        assert made(text).input_ids == stock(text).input_ids


def trainers_class(monkeypatch: pytest.MonkeyPatch, module: str, name: str, mark: Path) -> type:
    """A class of a trainer that leaves a mark when anything of it runs."""

    def touch(self: Any, state: Any = None) -> None:
        mark.touch()

    base = dict if name == "AttributeDict" else object
    made = type(name, (base,), {"__module__": module, "__init__": touch, "__setstate__": touch})
    parent = ""
    for part in module.split("."):
        parent = f"{parent}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    setattr(sys.modules[module], name, made)
    return made


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("lightning.pytorch.callbacks.early_stopping", "EarlyStopping"),
        ("lightning_fabric.utilities.data", "AttributeDict"),
    ],
)
def test_a_trainers_classes_are_read_past(
    tiny_path: Path, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:  # fmt: skip
    mark, file = tmp_path / "mark", tmp_path / "m.ckpt"
    with monkeypatch.context() as there:
        made = trainers_class(there, module, name, mark)
        instance = made()
        instance.kept = {"monitor": "val/loss", "best": torch.tensor(0.1)}
        if isinstance(instance, dict):
            instance["lr"] = 0.1
        torch.save({"callbacks": {made: {"best": 1}, "other": instance}, "state_dict": tensors}, file)
        mark.unlink()
        there.delitem(sys.modules, module)
        assert_same(loaded(file, config=str(tiny_path)), tiny_model(tiny_path, trainable=False))
    assert not mark.exists() and module not in sys.modules
    assert not any("ReadPast" in str(one) for one in torch.serialization.get_safe_globals())


def test_a_class_of_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainers_class(monkeypatch, "pytorch_lightning_helpers", "Thing", tmp_path / "mark")
    torch.save({"callbacks": {made: 1}, "state_dict": {}}, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", "rejected: this pickle is damaged, or loading it would run code")
