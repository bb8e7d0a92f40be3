"""LPIPS of all pairs against its definition, pair by pair."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from draftplus.errors import UserError
from draftplus.metrics import lpips
from draftplus.metrics.lpips import WEIGHTS, lpips_per_prompt, mean_pairwise_lpips, pairwise_lpips


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory) -> str:
    """AlexNet's shapes with random numbers."""
    torch.manual_seed(0)
    shapes = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
    weights = {}
    for index, (out, into, kernel) in enumerate(shapes):
        weights[f"features.{index}.weight"] = torch.randn(out, into, kernel, kernel) / (into * kernel**2) ** 0.5
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(out)
        weights[f"linear.{index}.weight"] = torch.rand(out)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.safetensors"
    save_file(weights, path)
    return str(path)


def by_definition(first: torch.Tensor, second: torch.Tensor, path: str) -> float:
    """LPIPS v0.1 of two images (3, H, W) in [0, 1], in float64."""
    weights = {name: tensor.double() for name, tensor in load_file(path).items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = ((image[None].double() * 2 - 1 - shift) / scale for image in (first, second))
    distance = 0.0
    strides, paddings, pools = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (False, True, True, False, False)
    for index in range(5):
        kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        if pools[index]:
            x, y = F.max_pool2d(x, 3, 2), F.max_pool2d(y, 3, 2)
        x = torch.relu(F.conv2d(x, kernel, bias, strides[index], paddings[index]))
        y = torch.relu(F.conv2d(y, kernel, bias, strides[index], paddings[index]))
        a = x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10)
        b = y / ((y**2).sum(1, keepdim=True).sqrt() + 1e-10)
        distance += F.conv2d((a - b) ** 2, weights[f"linear.{index}.weight"].view(1, -1, 1, 1)).mean().item()
    return distance


def pictures(count: int, height: int = 64, width: int = 64, cells: int = 8) -> torch.Tensor:
    coarse = torch.rand(count, 3, cells, cells, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("path", [str(WEIGHTS), "random"])
@pytest.mark.parametrize("size", [(64, 64), (31, 50), (97, 64)], ids=str)
def test_all_pairs_equal_the_definition_pair_by_pair(path, size, random_weights):
    path = random_weights if path == "random" else path
    images = pictures(4, *size)
    distances = pairwise_lpips(images, path)
    assert distances.shape == (4, 4) and distances.dtype == torch.float32
    assert distances.diagonal().eq(0).all() and torch.equal(distances, distances.T)
    for i, j in itertools.combinations(range(4), 2):
        expected = by_definition(images[i], images[j], path)
        assert expected > 0.01 and distances[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_near_duplicates_keep_their_distances():
    image = pictures(1)
    images = torch.cat(
        [image, image, image + 1e-4 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))]
    )
    distances = pairwise_lpips(images)
    expected = by_definition(images[0], images[2], str(WEIGHTS))
    assert 1e-10 < expected < 1e-5
    assert distances[0, 1] < 1e-10 and distances[0, 2].item() == pytest.approx(expected, rel=0.02)


def test_blur_and_noise_raise_the_distance_monotonically():
    image = pictures(1, cells=32)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    noisy = torch.cat([(image + level * noise).clamp(0, 1) for level in (0, 0.02, 0.05, 0.1, 0.2, 0.4)])
    blurred = torch.cat(
        [F.avg_pool2d(image, k, stride=1, padding=k // 2, count_include_pad=False) for k in (1, 3, 5, 9)]
    )
    for series in (noisy, blurred):
        assert (pairwise_lpips(series)[0].diff() > 0).all()


def test_blocks_passes_and_slices_do_not_change_the_distances(monkeypatch):
    images = pictures(11)
    whole = pairwise_lpips(images)
    monkeypatch.setattr(lpips, "_RESIDENT", 4 * 40_000)
    monkeypatch.setattr(lpips, "_IMAGES_PER_PASS", 3)
    monkeypatch.setattr(lpips, "_PRODUCT", 1000)
    blocks = pairwise_lpips(images)
    torch.testing.assert_close(blocks, whole, atol=1e-7, rtol=1e-5)
    assert blocks.diagonal().eq(0).all() and torch.equal(blocks, blocks.T)


def test_n_images_need_n_network_passes(monkeypatch):
    seen = []
    layers = lpips._layers
    monkeypatch.setattr(lpips, "_layers", lambda images, network: seen.append(len(images)) or layers(images, network))
    pairwise_lpips(pictures(20))
    assert sum(seen) == 20 + 1  # one more to learn the embeddings' length


def test_mean_is_over_pairs_of_different_images():
    images = pictures(4)
    distances = pairwise_lpips(images)
    pairs = [distances[i, j].item() for i, j in itertools.combinations(range(4), 2)]
    assert mean_pairwise_lpips(images) == pytest.approx(sum(pairs) / 6)


def test_diversity_averages_per_prompt_first():
    images = pictures(5)
    prompts = ["a cat", "a dog", "a cat", "a dog", "a cat"]
    cats, dogs = mean_pairwise_lpips(images[[0, 2, 4]]), mean_pairwise_lpips(images[[1, 3]])
    assert lpips_per_prompt(images, prompts) == pytest.approx({"a cat": cats, "a dog": dogs})
    assert list(lpips_per_prompt(images, prompts)) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="5 images but 4 prompts"):
        lpips_per_prompt(images, prompts[:4])


def test_one_image_has_no_diversity():
    assert pairwise_lpips(pictures(1)).tolist() == [[0.0]]
    with pytest.raises(UserError, match="at least 2 images per prompt, got 1"):
        mean_pairwise_lpips(pictures(1))
    with pytest.raises(UserError, match="got 1"):
        lpips_per_prompt(pictures(3), ["a cat", "a cat", "a dog"])


def test_bad_images_and_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"at least 31 pixels, got \(2, 3, 64, 30\)"):
        pairwise_lpips(pictures(2, 64, 30))
    with pytest.raises(UserError, match=r"got \(2, 1, 64, 64\)"):
        pairwise_lpips(pictures(2)[:, :1])
    with pytest.raises(UserError, match=r"got \(0, 3, 64, 64\)"):
        pairwise_lpips(pictures(2)[:0])
    with pytest.raises(UserError, match=r"absent\.safetensors' cannot be read"):
        pairwise_lpips(pictures(2), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 40, 40, dtype=torch.uint8), 255 * torch.ones(2, 3, 40, 40)])
def test_pictures_of_eight_bits_are_refused(images):
    with pytest.raises(UserError, match=r"images in \[0, 1\], got .* divide 8-bit images by 255"):
        pairwise_lpips(images)
