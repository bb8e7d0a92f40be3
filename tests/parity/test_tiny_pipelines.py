"""The tiny pipelines are worth testing with: every input of theirs can be seen in the picture."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.support.pipelines import PIPELINES, save_pipeline, stock

PROMPT = "a cat"
GUIDED = {"guidance scale": {"guidance_scale": 3.0}, "no guidance": {"guidance_scale": 1.0}}
NEGATIVE = {"negative prompt": {"negative_prompt": "ugly"}}
FLUX = {
    "prompt of CLIP": {"prompt": "a dog", "prompt_2": PROMPT},
    "prompt of T5": {"prompt_2": "a dog"},
    "true guidance": {"negative_prompt": "ugly", "true_cfg_scale": 3.0},
}
# what is passed to the stock pipeline in place of its defaults; another prompt and another number of steps go to each
CALLS: dict[str, dict[str, dict[str, Any]]] = {
    "sd": {**GUIDED, **NEGATIVE},
    "sdxl": {
        **GUIDED,
        **NEGATIVE,
        "empty negative prompt": {"negative_prompt": ""},
        "time ids": {"original_size": (512, 256)},
        "prompt of CLIP-L": {"prompt": "a dog", "prompt_2": PROMPT},
        "prompt of CLIP-G": {"prompt_2": "a dog"},
    },
    "sd3": {
        **GUIDED,
        **NEGATIVE,
        "prompt of CLIP-L": {"prompt": "a dog", "prompt_2": PROMPT, "prompt_3": PROMPT},
        "prompt of CLIP-G": {"prompt_2": "a dog"},
        "prompt of T5": {"prompt_3": "a dog"},
    },
    "sd3_without_t5": {**GUIDED, **NEGATIVE},
    "flux_dev": {**FLUX, "embedded guidance": {"guidance_scale": 1.5}},
    "flux_schnell": FLUX,
    "chroma": {**GUIDED, **NEGATIVE},
    "flux2_klein_base": GUIDED,
    "flux2_klein": {},
    "qwen_image": {
        "guidance": {"negative_prompt": " "},
        "guidance scale": {"negative_prompt": " ", "true_cfg_scale": 2.0},
        "negative prompt": {"negative_prompt": "ugly"},
    },
    "zimage": {**GUIDED, **NEGATIVE, "no guidance": {"guidance_scale": 0.0}},
    "zimage_turbo": {"guidance": {"guidance_scale": 1.0}},
}
TEXT = ["timestep", "encoder_hidden_states"]
FLUX_INPUTS = [*TEXT, "pooled_projections", "img_ids"]
INPUTS: dict[str, list[str]] = {  # of the denoiser
    "sd": TEXT,
    "sdxl": [*TEXT, "added_cond_kwargs/text_embeds", "added_cond_kwargs/time_ids"],
    "sd3": [*TEXT, "pooled_projections"],
    "sd3_without_t5": [*TEXT, "pooled_projections"],
    "flux_dev": [*FLUX_INPUTS, "guidance"],
    "flux_schnell": FLUX_INPUTS,
    "chroma": [*TEXT, "img_ids", "attention_mask"],
    "flux2_klein_base": [*TEXT, "img_ids", "txt_ids"],
    "flux2_klein": [*TEXT, "img_ids", "txt_ids"],
    "qwen_image": TEXT,
    "zimage": ["t", "cap_feats"],
    "zimage_turbo": ["t", "cap_feats"],
}
DEFAULTS: dict[str, dict[str, Any]] = {"zimage_turbo": {"guidance_scale": 0.0}}  # as its card says


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Tensor]:
    """A pipeline's name, its stock object, and its picture of the defaults, (3, 64, 64)."""
    pipe = stock(save_pipeline(request.param, tmp_path_factory.mktemp(request.param)))
    return request.param, pipe, picture(pipe, **DEFAULTS.get(request.param, {}))


def picture(pipe: Any, **options: Any) -> Tensor:
    settings = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2, **options}
    return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images[0]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def changed(pipe: Any, path: str, change: Callable[[Any], Any], options: dict[str, Any]) -> Tensor:
    """The picture where one input of the denoiser, a keyword or a path of them, is another."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    name, _, key = path.partition("/")
    signature = inspect.signature(type(denoiser).forward)

    def alter(module: Any, args: Any, kwargs: Any) -> Any:
        bound = signature.bind(module, *args, **kwargs).arguments
        del bound["self"]
        bound[name] = {**bound[name], key: change(bound[name][key])} if key else change(bound[name])
        return (), bound

    handle = denoiser.register_forward_pre_hook(alter, with_kwargs=True)
    try:
        return picture(pipe, **options)
    finally:
        handle.remove()


def other(value: Any) -> Any:
    """A smaller timestep or guidance, embeddings in another order (norms hide a scale), half the position ids."""
    if isinstance(value, list):
        return [other(part) for part in value]
    if not value.is_floating_point():
        return value // 2
    return 0.8 * value if value.ndim < 2 else value.roll(1, -1)


def test_every_pipeline_has_its_inputs_listed() -> None:
    assert set(PIPELINES) == set(CALLS) == set(INPUTS)


def test_picture_shows_detail_and_is_not_saturated(pipeline: tuple[str, Any, Tensor]) -> None:
    _, _, image = pipeline
    assert image.std(dim=(1, 2)).min() > 0.05
    assert (image[..., 1:] - image[..., :-1]).abs().mean() > 0.01
    assert ((image <= 0) | (image >= 1)).float().mean() < 0.2


def test_every_option_shows_in_the_picture(pipeline: tuple[str, Any, Tensor]) -> None:
    name, pipe, image = pipeline
    default = DEFAULTS.get(name, {})
    calls = {**CALLS[name], "prompt": {"prompt": "a dog"}, "steps": {"num_inference_steps": 3}}
    assert difference(image, picture(pipe, **default)) == 0
    shown = {what: difference(image, picture(pipe, **default | options)) for what, options in calls.items()}
    assert min(shown.values()) > 0.01, shown


def test_every_input_of_the_denoiser_shows_in_the_picture(pipeline: tuple[str, Any, Tensor]) -> None:
    name, pipe, image = pipeline
    default = DEFAULTS.get(name, {})
    assert difference(image, changed(pipe, INPUTS[name][0], lambda value: value, default)) == 0
    shown = {path: difference(image, changed(pipe, path, other, default)) for path in INPUTS[name]}
    assert min(shown.values()) > 0.01, shown


@torch.no_grad()
def test_detail_passes_through_the_vae(pipeline: tuple[str, Any, Tensor]) -> None:
    """A change of one latent pixel shows most where it lies, and a change of the image shows in the latents."""
    name, pipe, image = pipeline
    frames = (1,) if name == "qwen_image" else ()  # its VAE is one of videos
    latents = pipe.vae.encode(2 * image.reshape(1, 3, *frames, 64, 64) - 1).latent_dist.mode()
    assert latents.shape[-2:] == ((32, 32) if name == "sd" else (8, 8))
    moved = latents.clone()
    moved[..., 0, 0] += 3 * latents.std()
    shown = (pipe.vae.decode(moved).sample - pipe.vae.decode(latents).sample).abs()
    assert shown[..., :16, :16].mean() > 2 * shown[..., 32:, 32:].mean()
    assert shown[..., :16, :16].max() > 0.05
    negative = pipe.vae.encode(1 - 2 * image.reshape(1, 3, *frames, 64, 64)).latent_dist.mode()
    assert (negative - latents).abs().mean() > 0.1 * latents.std()


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stock(save_pipeline("qwen_image", tmp_path_factory.mktemp("qwen_image")))


def test_qwen_template_is_as_long_as_by_the_true_tokenizer(qwen_image: Any) -> None:
    start = qwen_image.prompt_template_encode.split("{}")[0]
    assert len(qwen_image.tokenizer(start).input_ids) == qwen_image.prompt_template_encode_start_idx


def test_mask_of_a_shorter_prompt_shows_in_the_picture(qwen_image: Any) -> None:
    pair = {"prompt": [PROMPT, "a dog on a blue background"]}
    image = picture(qwen_image, **pair)
    assert difference(image, changed(qwen_image, "encoder_hidden_states_mask", lambda mask: None, pair)) > 0.01


def test_stock_refuses_a_missing_text_encoder_unless_told(tmp_path: Path) -> None:
    """Which is why `stock` names the parts that an index holds as null."""
    save_pipeline("sd3_without_t5", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    with pytest.raises(ValueError, match="text_encoder_3"):
        DiffusionPipeline.from_pretrained(tmp_path)
