"""The JPEG rewards against finite differences and against Pillow's real file sizes."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from draftplus.errors import UserError
from draftplus.rewards.jpeg import load_jpeg_compressibility as compressibility
from draftplus.rewards.jpeg import load_jpeg_incompressibility as incompressibility


def ramp_of_detail(size: int = 64) -> torch.Tensor:
    """Images (5, 3, size, size) from flat to noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, size, size, generator=generator)
    images = [torch.full((1, 3, size, size), 0.4)]
    for cells in (4, 8, 16):
        coarse = torch.nn.functional.adaptive_avg_pool2d(noise, cells)
        spread = (coarse - coarse.mean()) / coarse.std() * 0.2 + 0.5
        images.append(torch.nn.functional.interpolate(spread, (size, size), mode="bicubic").clamp(0, 1))
    return torch.cat([*images, noise])


def file_size(image: torch.Tensor, quality: int = 75) -> int:
    buffer = io.BytesIO()
    array = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "JPEG", quality=quality)
    return buffer.tell()


def test_order_agrees_with_real_file_sizes():
    images = ramp_of_detail()
    sizes = torch.tensor([file_size(image) for image in images])
    scores = compressibility()(images, [""] * 5)
    assert (sizes.diff() > 0).all() and (scores.diff() < 0).all()


def test_range_and_sign_symmetry():
    images = ramp_of_detail()
    low, high = compressibility()(images, [""] * 5), incompressibility()(images, [""] * 5)
    assert torch.equal(low, -high) and (high >= 0).all() and (high < 255).all()


@pytest.mark.parametrize(("load", "sign"), [(compressibility, -1), (incompressibility, 1)])
def test_following_the_gradient_changes_real_file_sizes(load, sign):
    images = ramp_of_detail()[1:4]
    before = [file_size(image) for image in images]
    pixels = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=4 / 255)
    reward = load()
    for _ in range(15):
        optimizer.zero_grad()
        (-reward(pixels, [""] * 3)).sum().backward()
        optimizer.step()
        pixels.data.clamp_(0, 1)
    after = [file_size(image) for image in pixels.detach()]
    assert all(sign * (a - b) > 0 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (23, 37)], ids=str)
def test_gradient_equals_finite_differences(size):
    reward = incompressibility()
    images = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    scores = reward(images, [""])
    assert scores.dtype == torch.float64
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    h = 1e-7  # small enough that no coefficient crosses a rounding boundary, where the codec jumps
    with torch.no_grad():
        slope = (reward(images + h * direction, [""]) - reward(images - h * direction, [""])).item() / (2 * h)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4) and abs(slope) > 1e-2


def test_images_are_scored_each_by_itself():
    images = ramp_of_detail(20)
    alone = torch.cat([compressibility()(image[None], [""]) for image in images])
    torch.testing.assert_close(compressibility()(images, [""] * 5), alone)


@pytest.mark.parametrize("value", [0.0, 128 / 255, 1.0])
def test_flat_images_have_a_finite_gradient(value):
    images = torch.full((1, 3, 16, 16), value, requires_grad=True)
    compressibility(quality=50)(images, [""]).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("quality", [0, 101, float("nan")])
@pytest.mark.parametrize("load", [compressibility, incompressibility])
def test_impossible_quality_is_refused(load, quality):
    name = load.__name__.removeprefix("load_")
    with pytest.raises(UserError, match=f"'{name}': args.quality is {quality}; it must be a number from 1 to 100"):
        load(quality=quality)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    with pytest.raises(UserError, match=r"pip install 'draftplus\[jpeg\]'"):
        compressibility()
