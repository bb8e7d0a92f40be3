"""Weights in single files: whole ones of SDXL, and denoisers and autoencoders in the original layout and diffusers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from draftplus import api
from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models import fitting, single_file, stock
from draftplus.models import sdxl as family
from draftplus.models.families import family_of
from draftplus.models.loading import Source
from tests.families.cases import CASES, load_model, stock_picture
from tests.families.conftest import Saved
from tests.support import original
from tests.support.ldm import as_sdxl_file, sd3_as_original, unet_as_ldm, vae_as_ldm
from tests.support.pipelines import PIPELINES, lively
from tests.support.pipelines import stock as stock_of

SAID = ["sampler.steps=2", "sampler.height=64", "sampler.width=96", "device=cpu"]
CALL = {"num_inference_steps": 2, "height": 64, "width": 96}
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL whose text encoders differ in width, as those of the true one do, and the same as one file beside."""
    pipe = PIPELINES["sdxl"]()
    config = CLIPTextConfig.from_dict({**pipe.text_encoder.config.to_dict(), "hidden_size": 16})
    pipe.text_encoder = lively(CLIPTextModel(config), 9)
    pipe.unet = lively(UNet2DConditionModel.from_config(pipe.unet.config, cross_attention_dim=48), 4)
    directory = tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(directory / "model")
    save_file({name: tensor.contiguous() for name, tensor in as_sdxl_file(pipe).items()}, directory / "m.safetensors")
    return directory


def refused(load: Any, *says: str) -> None:
    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert "\n" not in message and all(one in message for one in says), message


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_whole_sdxl_draws_the_stock_picture(sdxl: Path, tmp_path: Path, ending: str) -> None:
    file = sdxl / "m.safetensors"
    if ending == "ckpt":
        file = tmp_path / "m.ckpt"
        torch.save({"state_dict": {**load_file(sdxl / "m.safetensors"), "model_ema.decay": torch.zeros(())}}, file)
    ours = api.generate(str(file), ["a cat on a mat"], [3], [f"model.config={sdxl / 'model'}", *SAID])
    pipe = StableDiffusionXLPipeline.from_single_file(str(file), config=str(sdxl / "model"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = stock_picture(pipe, "a cat on a mat", 3, **CALL)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(expected, stock_picture(stock_of(sdxl / "model"), "a cat on a mat", 3, **CALL))


def test_a_whole_sdxl_that_does_not_fit(sdxl: Path, tmp_path: Path) -> None:
    state, file = load_file(sdxl / "m.safetensors"), tmp_path / "m.safetensors"
    config = f"model.config={sdxl / 'model'}"
    unet = "model.diffusion_model."
    for change, says in (
        ({f"{unet}out.2.weight": None}, "missing: conv_out.weight"),
        ({f"{unet}control.{i}.weight": torch.zeros(1) for i in range(5)}, "control.2.weight and 2 more"),
        ({f"{unet}out.2.weight": torch.zeros(4, 9, 3, 3)}, "conv_out.weight is 4×9×3×3, not 4×8×3×3"),
        ({"first_stage_model.decoder.what": torch.zeros(1)}, "not among its own: first_stage_model.decoder.what"),
        ({"conditioner.embedders.1.model.ln_final.weight": None}, "missing: text_model.final_layer_norm.weight"),
    ):
        save_file({name: t for name, t in {**state, **change}.items() if t is not None}, file)
        refused(lambda: api.generate(str(file), ["a"], [0], [config, *SAID]), "its weights do not fit", says)


def header(tmp_path: Path, names: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Path:
    file = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(shape, dtype=torch.int8) for name, shape in names.items()}, file, metadata)
    return file


BASE = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,), "model.diffusion_model.x": (1,)}


def test_the_family_follows_the_weights(sdxl: Path, tmp_path: Path) -> None:
    file = header(tmp_path, BASE)
    assert family_of(ModelConfig(path=str(file))).load == "draftplus.models.sdxl:load"
    assert single_file.source(ModelConfig(), str(file)).directory == single_file.CONFIGS / "sdxl"
    header(tmp_path, {"model.diffusion_model.label_emb.0.0.weight": (1,)})
    refused(lambda: family_of(ModelConfig(path=str(file))), "SDXL's UNet without the text encoders", "model.denoiser")
    header(tmp_path, {"model.diffusion_model.x": (1,)})
    assert family_of(ModelConfig(path=str(file))).load == "draftplus.models.stable_diffusion:load"
    for config in ("sdxl", str(sdxl / "model")):
        assert family_of(ModelConfig(path=str(file), config=config)).load == "draftplus.models.sdxl:load"


def test_a_file_that_says_it_predicts_v(tmp_path: Path) -> None:
    """Stock diffusers draws noise of it: nothing but the scheduler's configuration tells."""
    for names, metadata in (({**BASE, "v_pred": (1,)}, None), (BASE, {"modelspec.prediction_type": "v"})):
        file = str(header(tmp_path, names, metadata))
        refused(lambda: single_file.source(ModelConfig(), file), "predicts v", "set model.config to")  # noqa: B023
        assert single_file.source(ModelConfig(config="sdxl"), file)


OTHERS = {
    "FLUX.1-schnell": {"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (1,)},
    "stable-diffusion-3.5-large": {"model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight": (1,)},
    "FLUX.2-dev": {"single_stream_modulation.lin.weight": (1,)},
    "Z-Image-Turbo": {"layers.0.adaLN_modulation.0.weight": (1,)},
}


@pytest.mark.parametrize("like", OTHERS)
def test_another_familys_file_belongs_to_the_denoiser(tmp_path: Path, like: str) -> None:
    file = str(header(tmp_path, OTHERS[like]))
    refused(lambda: family_of(ModelConfig(path=file)), like, "goes to model.denoiser", "as model.path")


def test_the_packaged_configuration_is_that_of_the_published_model() -> None:
    """By the published numbers of parameters."""
    directory = single_file.CONFIGS / "sdxl"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(directory / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(directory / "vae"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(directory / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(directory / "text_encoder_2"))
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (unet, vae, first, second)]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert (first.config.hidden_act, second.config.hidden_act) == ("quick_gelu", "gelu")
    assert (vae.config.scaling_factor, vae.config.force_upcast) == (0.13025, True)
    assert json.loads((directory / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True
    made = single_file.tokenizers(directory)
    padded = {name: made[name]("a cat", padding="max_length").input_ids for name in made}
    assert {name: (ids[:4], ids[4]) for name, ids in padded.items()} == {
        "tokenizer": ([49406, 320, 2368, 49407], 49407), "tokenizer_2": ([49406, 320, 2368, 49407], 0)
    }  # fmt: skip


def test_the_packaged_configuration_makes_the_stock_pipeline() -> None:
    """All but the weights: scheduler, settings and tokenizers."""
    source = Source(ModelConfig(), single_file.CONFIGS / "sdxl", {})
    there = stock.present(family.KIND, source.directory)
    pipe = stock.without_weights(family.KIND, source, there, torch.float32)
    scheduler = pipe.scheduler.config
    assert (scheduler.timestep_spacing, scheduler.steps_offset, scheduler.prediction_type) == ("leading", 1, "epsilon")
    assert (type(pipe.scheduler).__name__, pipe.default_sample_size) == ("EulerDiscreteScheduler", 128)
    assert pipe.tokenizer_2.pad_token == "!" and pipe.config.force_zeros_for_empty_prompt


def originals(name: str, pipe: Any) -> dict[str, dict[str, Tensor]]:
    """The denoiser and the autoencoder as single files of the original layout hold them."""
    vae = {key.removeprefix("first_stage_model."): t for key, t in vae_as_ldm(pipe.vae.state_dict(), 4).items()}
    vae["loss.logvar"] = torch.zeros(1)  # which its authors' own files have
    if name == "sdxl":
        return {"denoiser": unet_as_ldm(pipe.unet.state_dict(), 1, 3), "vae": vae}
    state = sd3_as_original(pipe.transformer.state_dict(), 3)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}
    return {"denoiser": {**prefixed, "first_stage_model.conv": torch.zeros(1)}, "vae": vae}


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("layout", ["original", "diffusers", "folder"])
def test_replacement_parts(saved: Saved, tmp_path: Path, name: str, layout: str) -> None:
    """In each layout and both keys: the network is the one that was saved, to the bit."""
    pipe = PIPELINES[name]()
    component = "unet" if name == "sdxl" else "transformer"
    networks = {"denoiser": lively(getattr(pipe, component), 77), "vae": lively(pipe.vae, 78)}
    given = {}
    for key, state in originals(name, pipe).items():
        if layout == "folder":
            networks[key].save_pretrained(tmp_path / key)
            given[key] = str(tmp_path / key)
            continue
        state = state if layout == "original" else networks[key].state_dict()
        given[key] = str(tmp_path / f"{key}.safetensors")
        save_file({one: tensor.contiguous() for one, tensor in state.items()}, given[key])
    made = load_model(saved(name), torch.float32, trainable=False, **given)
    for key, network in (("denoiser", made.tuned.denoiser), ("vae", made.vae)):
        own, expected = network.state_dict(), networks[key].state_dict()
        assert own.keys() == expected.keys() and all(torch.equal(own[one], expected[one]) for one in own)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux2_klein", "zimage"])
def test_a_denoiser_as_its_authors_name_it(saved: Saved, tmp_path: Path, name: str, prefix: str) -> None:
    network = lively(PIPELINES[name]().transformer, 77)
    state = {"flux2_klein": original.flux2, "zimage": original.z_image}[name](network.state_dict())
    file = tmp_path / "m.safetensors"
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in state.items()}, file)
    made = load_model(saved(name), torch.float32, trainable=False, denoiser=str(file)).tuned.denoiser.state_dict()
    expected = network.state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[key], expected[key]) for key in made)
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in list(state.items())[:-1]}, file)
    refused(lambda: load_model(saved(name), trainable=False, denoiser=str(file)).tuned, "missing: ")


def test_flux_as_its_authors_name_it() -> None:
    """By names and shapes: stock reads that layout for FLUX.1's true width alone."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=True)
        state = original.flux(network.state_dict())
    assert not fitting.compared(network, state)
    assert str(fitting.compared(network, {**state, "scaled_fp8": torch.ones(2)})) == "not among its own: scaled_fp8"
    del state["single_blocks.1.linear2.weight"]
    assert "missing" in str(fitting.compared(network, state))


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoiser_in_diffusers_layout(saved: Saved, tmp_path: Path, name: str, prefix: str) -> None:
    """As tools of other programs prefix it, too; each family's."""
    directory = saved(name)
    (folder,) = [directory / one for one in ("unet", "transformer") if (directory / one).is_dir()]
    if prefix and folder.name == "unet":
        pytest.skip("the prefix belongs to the original layout")
    state = {f"{prefix}{key}": -tensor for key, tensor in load_file(folder / FILE).items()}
    file = tmp_path / "m.safetensors"
    save_file(state, file)
    made = load_model(directory, torch.float32, trainable=False, denoiser=str(file)).tuned.denoiser.state_dict()
    assert all(torch.equal(tensor, state[f"{prefix}{key}"]) for key, tensor in made.items())
    save_file({**state, f"{prefix}one.scale_weight": torch.ones(1)}, file)
    refused(
        lambda: load_model(directory, trainable=False, denoiser=str(file)).tuned,
        f"model.denoiser '{file}'", "not among its own: one.scale_weight",
    )  # fmt: skip


def test_a_part_of_another_family(saved: Saved, tmp_path: Path) -> None:
    sdxl, sd3 = saved("sdxl"), saved("sd3")
    flux = header(tmp_path, {"double_blocks.0.img_attn.norm.key_norm.scale": (1,), "guidance_in.in_layer.bias": (1,),
                             "img_in.weight": (1, 64)})  # fmt: skip
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(1)}, lora)
    for path, settings, says in (
        (sdxl, {"denoiser": str(sd3 / "transformer")}, "it is a SD3Transformer2DModel, which is not supported"),
        (sdxl, {"vae": str(sd3 / "vae")}, "its UNet is not one of a text-to-image model"),
        (sd3, {"vae": str(sdxl / "vae")}, "its transformer is not one of a text-to-image model"),
        (sd3, {"denoiser": str(sdxl / "unet")}, "it is a UNet2DConditionModel, which is not supported"),
        (sdxl, {"denoiser": str(sd3 / "transformer" / FILE)}, "do not fit"),
        (sdxl, {"vae": str(sd3 / "vae" / FILE)}, "of another shape: decoder.conv_in.weight is 8×16×3×3, not 8×4×3×3"),
        (sd3, {"denoiser": str(flux)}, "which are like those of black-forest-labs/FLUX.1-dev"),
        (sd3, {"denoiser": str(lora)}, "an adapter's (LoRA)"),
        (sd3, {"denoiser": str(tmp_path / "none.safetensors")}, "no such file or directory"),
        (sd3, {"vae": str(tmp_path)}, "it has no config.json"),
    ):  # fmt: skip
        refused(lambda: load_model(path, trainable=False, **settings).tuned, *settings.values(), says)  # noqa: B023
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(lambda: load_model(sd3, denoiser=str(tmp_path / "m.gguf")), "quantised weights are not supported")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_weights_in_a_folder_that_do_not_fit(saved: Saved, tmp_path: Path, part: str) -> None:
    directory = Path(shutil.copytree(saved("sdxl"), tmp_path / "m"))
    (file,) = (directory / part).glob("*.safetensors")
    state = load_file(file)
    first = min(name for name, tensor in state.items() if tensor.ndim > 1)
    for change, says in (
        ({first: None}, "missing: "),
        ({f"one.{i}.more": torch.zeros(1) for i in range(4)}, "own: one.0.more, one.1.more, one.2.more and 1 more"),
        ({first: torch.zeros(3, 5)}, "is 3×5, not"),
    ):  # fmt: skip
        changed = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        save_file(changed, file, {"format": "pt"})
        refused(lambda: load_model(directory, trainable=False).encode(["a"]).hidden.shape if part.startswith("text")
                else load_model(directory, trainable=False).tuned, "its weights do not fit", says)  # fmt: skip


def test_what_may_lie_beside_the_weights_of_a_text_encoder(saved: Saved, tmp_path: Path) -> None:
    """Old buffers, and the heads and towers of the model that it was cut from."""
    directory = Path(shutil.copytree(saved("sd3"), tmp_path / "m"))
    for part, more in (
        ("text_encoder", ["text_model.embeddings.position_ids", "vision_model.x.weight", "logit_scale"]),
        ("text_encoder_3", ["decoder.block.0.x.weight", "lm_head.weight", "encoder.embed_tokens.weight"]),
    ):
        file = directory / part / "model.safetensors"
        state = load_file(file)
        shared = state.get("shared.weight", torch.zeros(1, 77)).clone()
        save_file({**state, **{name: torch.zeros(1) for name in more[:-1]}, more[-1]: shared}, file, {"format": "pt"})
    hidden = load_model(directory, torch.float32).encode(["a cat"]).hidden
    assert torch.equal(hidden, load_model(saved("sd3"), torch.float32).encode(["a cat"]).hidden)
