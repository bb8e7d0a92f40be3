"""Differentiable preprocessing against transformers' own processor, which goes through PIL."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from draftplus.errors import UserError
from draftplus.rewards.preprocessing import preprocess, read_preprocessing


def pictures(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Smooth images (n, 3, H, W) whose values are multiples of 1/255, as a PNG holds them."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def reference(processor: CLIPImageProcessorPil, images: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(processor(images=to_pil(images), return_tensors="pt")["pixel_values"])


def saved(directory, **settings) -> tuple[CLIPImageProcessorPil, str]:
    processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": 32, **settings})
    processor.save_pretrained(directory)
    return processor, str(directory)


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"do_resize": False}, {"image_mean": [0.1, 0.2, 0.3]}],
    ids=str,
)
def test_nothing_resized_equals_the_reference(tmp_path, settings):
    processor, path = saved(tmp_path, **settings)
    images = pictures(32, 32)
    torch.testing.assert_close(
        preprocess(images, read_preprocessing(path)), reference(processor, images), atol=1e-5, rtol=1e-6
    )


@pytest.mark.parametrize("size", [(20, 20), (64, 64), (50, 71), (71, 50), (33, 40)], ids=str)
@pytest.mark.parametrize("resample", [2, 3])
def test_resized_equals_the_reference_up_to_8_bits(tmp_path, size, resample):
    processor, path = saved(tmp_path, resample=resample, do_normalize=False)
    images = pictures(*size)
    difference = preprocess(images, read_preprocessing(path)) - reference(processor, images)
    assert difference.abs().max() < 2 / 255  # PIL rounds after each of its two passes


@pytest.mark.parametrize("size", [(31, 40), (20, 25), (33, 47)], ids=str)
def test_crop_of_odd_and_of_too_small_images(tmp_path, size):
    processor, path = saved(tmp_path, do_resize=False)
    images = pictures(*size)
    torch.testing.assert_close(
        preprocess(images, read_preprocessing(path)), reference(processor, images), atol=1e-5, rtol=1e-6
    )


def test_old_style_sizes_and_clip_defaults(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 48, "crop_size": 32, "resample": 3}')
    spec = read_preprocessing(str(tmp_path))
    assert (spec.resize, spec.crop, spec.scale, spec.filter) == (48, (32, 32), 1.0, "bicubic")
    assert spec.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_processor_saved_as_one_file(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"size": {"height": 8, "width": 9}}}')
    assert read_preprocessing(str(tmp_path)).resize == (8, 9)


def test_gradient_reaches_every_pixel_in_the_crop_and_float64_stays():
    spec = read_preprocessing_of(resize=16, crop=16)
    images = (0.25 + 0.5 * torch.rand(1, 3, 24, 24, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preprocess(x, spec).square().sum(), (images,))
    preprocess(images, spec).square().sum().backward()
    assert images.grad.dtype == torch.float64 and (images.grad != 0).all()


def read_preprocessing_of(resize: int, crop: int):
    from draftplus.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

    return Preprocessing(resize, "bicubic", (crop, crop), 1.0, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"resample": 0}', "filter 0"),
        ('{"size": {"longest_edge": 224}}', "longest_edge"),
        ("{", "not valid JSON"),
        (None, "args.processor"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, config, words):
    if config is not None:
        (tmp_path / "preprocessor_config.json").write_text(config)
    with pytest.raises(UserError, match=words):
        read_preprocessing(str(tmp_path))
