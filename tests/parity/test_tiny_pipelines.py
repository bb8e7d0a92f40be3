"""The tiny pipelines are worth testing with: every input of theirs can be seen in the picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.pipelines import PIPELINES, save_pipeline, stock

PROMPT = "a cat"
CALLS: dict[str, dict[str, dict[str, Any]]] = {  # what is passed to the stock pipeline in place of its defaults
    "sdxl": {
        "prompt": {"prompt": "a dog"},
        "empty negative prompt": {"negative_prompt": ""},
        "negative prompt": {"negative_prompt": "ugly"},
        "guidance scale": {"guidance_scale": 3.0},
        "no guidance": {"guidance_scale": 1.0},
        "time ids": {"original_size": (512, 256)},
    },
    "sd3": {
        "prompt": {"prompt": "a dog"},
        "prompt of CLIP-L": {"prompt": "a dog", "prompt_2": PROMPT, "prompt_3": PROMPT},
        "prompt of CLIP-G": {"prompt_2": "a dog"},
        "prompt of T5": {"prompt_3": "a dog"},
        "negative prompt": {"negative_prompt": "ugly"},
        "guidance scale": {"guidance_scale": 3.0},
        "no guidance": {"guidance_scale": 1.0},
    },
    "sd3_without_t5": {
        "prompt": {"prompt": "a dog"},
        "negative prompt": {"negative_prompt": "ugly"},
        "guidance scale": {"guidance_scale": 3.0},
        "no guidance": {"guidance_scale": 1.0},
    },
}
INPUTS: dict[str, list[str]] = {  # of the denoiser
    "sdxl": ["timestep", "encoder_hidden_states", "added_cond_kwargs/text_embeds", "added_cond_kwargs/time_ids"],
    "sd3": ["timestep", "encoder_hidden_states", "pooled_projections"],
    "sd3_without_t5": ["timestep", "encoder_hidden_states", "pooled_projections"],
}


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Tensor]:
    """A pipeline's name, its stock object, and its picture of the defaults, (3, 64, 64)."""
    pipe = stock(save_pipeline(request.param, tmp_path_factory.mktemp(request.param)))
    return request.param, pipe, picture(pipe)


def picture(pipe: Any, **options: Any) -> Tensor:
    settings = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 3, **options}
    return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images[0]


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def changed(pipe: Any, path: str, change: Callable[[Any], Any]) -> Tensor:
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
        return picture(pipe)
    finally:
        handle.remove()


def smaller(value: Any) -> Any:
    return [smaller(part) for part in value] if isinstance(value, list) else 0.8 * value


def test_every_pipeline_has_its_inputs_listed() -> None:
    assert set(PIPELINES) == set(CALLS) == set(INPUTS)


def test_picture_shows_detail_and_is_not_saturated(pipeline: tuple[str, Any, Tensor]) -> None:
    _, _, image = pipeline
    assert image.std(dim=(1, 2)).min() > 0.05
    assert (image[..., 1:] - image[..., :-1]).abs().mean() > 0.01
    assert ((image <= 0) | (image >= 1)).float().mean() < 0.2


def test_every_option_shows_in_the_picture(pipeline: tuple[str, Any, Tensor]) -> None:
    name, pipe, image = pipeline
    assert difference(image, picture(pipe)) == 0
    shown = {what: difference(image, picture(pipe, **options)) for what, options in CALLS[name].items()}
    assert min(shown.values()) > 0.01, shown


def test_every_input_of_the_denoiser_shows_in_the_picture(pipeline: tuple[str, Any, Tensor]) -> None:
    name, pipe, image = pipeline
    assert difference(image, changed(pipe, INPUTS[name][0], lambda value: value)) == 0
    shown = {path: difference(image, changed(pipe, path, smaller)) for path in INPUTS[name]}
    assert min(shown.values()) > 0.01, shown


@torch.no_grad()
def test_detail_passes_through_the_vae(pipeline: tuple[str, Any, Tensor]) -> None:
    """A change of one latent pixel shows most where it lies, and a change of the image shows in the latents."""
    _, pipe, image = pipeline
    frames = (1,) if "z_dim" in pipe.vae.config else ()  # Qwen-Image's VAE is one of videos
    latents = pipe.vae.encode(2 * image.reshape(1, 3, *frames, 64, 64) - 1).latent_dist.mode()
    assert latents.shape[-2:] == (8, 8)
    moved = latents.clone()
    moved[..., 0, 0] += 3 * latents.std()
    shown = (pipe.vae.decode(moved).sample - pipe.vae.decode(latents).sample).abs()
    assert shown[..., :16, :16].mean() > 2 * shown[..., 32:, 32:].mean()
    assert shown[..., :16, :16].max() > 0.05
    other = pipe.vae.encode(1 - 2 * image.reshape(1, 3, *frames, 64, 64)).latent_dist.mode()
    assert (other - latents).abs().mean() > 0.1 * latents.std()
