"""LPIPS distances between all pairs of images, and the diversity of images of one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from draftplus.errors import UserError

WEIGHTS = Path(__file__).parents[1] / "assets" / "lpips" / "alexnet.safetensors"
SMALLEST = 31  # pixels; the second pooling has nothing to pool in smaller images

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # (stride, padding)
_POOL_BEFORE = (1, 2)
_IMAGES_PER_PASS = 16
_RESIDENT = 2**28  # floats of embeddings held at once, 1 GiB: 100 images of 512x512
_PRODUCT = 2**22  # float64 numbers of a slice of them, 32 MiB


def pairwise_lpips(images: Tensor, weights: str | Path = WEIGHTS) -> Tensor:
    """LPIPS (AlexNet, v0.1; Zhang et al. 2018) between all pairs of n images.

    images: (n, 3, H, W) in [0, 1], H and W at least 31. Returns (n, n) float32 >= 0, symmetric, zero on the diagonal,
    on the images' device. n network passes (more, where the embeddings of n images exceed 1 GiB). UserError for images
    of another shape and unreadable weights.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST or len(images) == 0:
        raise UserError(
            f"LPIPS needs n >= 1 images (n, 3, H, W), sides of at least {SMALLEST} pixels, got {tuple(images.shape)}; "
            "raise sampler.height and sampler.width."
        )
    if not images.is_floating_point() or images.amin() < -0.01 or images.amax() > 1.01:
        raise UserError(
            f"LPIPS needs images in [0, 1], got {images.dtype} from {images.amin().item():g} to "
            f"{images.amax().item():g}: divide 8-bit images by 255."
        )
    network = _network(str(weights), images.device)
    distances = torch.zeros(len(images), len(images), dtype=torch.float64)  # (n, n)
    size = max(1, _RESIDENT // _embed(images[:1], network).shape[1])
    starts = range(0, len(images), size)
    for row in starts:
        rows = _embed(images[row : row + size], network)  # (r, k)
        for column in starts[row // size :]:
            columns = rows if column == row else _embed(images[column : column + size], network)
            distances[row : row + size, column : column + size] = _squared_distances(rows, columns)
    distances = distances.triu(diagonal=1)
    return (distances + distances.T).to(images.device, torch.float32)


def mean_pairwise_lpips(images: Tensor, weights: str | Path = WEIGHTS) -> float:
    """Mean LPIPS over the n(n - 1)/2 pairs of n >= 2 images (n, 3, H, W) in [0, 1]. UserError where n < 2."""
    n = len(images)
    if n < 2:
        raise UserError(f"diversity needs at least 2 images per prompt, got {n}: raise images_per_prompt.")
    return float(pairwise_lpips(images, weights).double().sum() / (n * (n - 1)))


def lpips_per_prompt(images: Tensor, prompts: Sequence[str], weights: str | Path = WEIGHTS) -> dict[str, float]:
    """The mean pairwise LPIPS of each prompt's images. images: (n, 3, H, W) in [0, 1]; prompts: their n prompts.

    Prompts come in order of first appearance; their images need not be neighbours. UserError for a prompt with one
    image.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    return {prompt: mean_pairwise_lpips(images[index], weights) for prompt, index in rows.items()}


@lru_cache(maxsize=2)
def _network(path: str, device: torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"LPIPS weights '{path}' cannot be read ({error}): reinstall draftplus.") from error
    return {name: tensor.float() for name, tensor in network.items()}


@torch.no_grad()
def _embed(images: Tensor, network: dict[str, Tensor]) -> Tensor:
    """Vectors (n, k) float32 whose squared Euclidean distances are the LPIPS distances.

    LPIPS is the sum over layers of the mean over places of Σ_c w_c (f̂0 - f̂1)², so with each layer's unit-normalised
    features times sqrt(w_c / places), one after another, it is a squared distance of two long vectors.
    """
    embeddings = images.new_empty(0, dtype=torch.float32)
    for start in range(0, len(images), _IMAGES_PER_PASS):
        # TF32, the default of convolutions on recent GPUs, is off by 1e-3: more than near-duplicates differ by
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            part = torch.cat(_layers(images[start : start + _IMAGES_PER_PASS].float(), network), dim=1)
        if start == 0:
            embeddings = part.new_empty(len(images), part.shape[1])
        embeddings[start : start + len(part)] = part
    return embeddings


def _layers(images: Tensor, network: dict[str, Tensor]) -> list[Tensor]:
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
    x = (2 * images - 1 - shift) / scale  # (b, 3, H, W)
    layers = []
    for index, (stride, padding) in enumerate(_CONVOLUTIONS):
        if index in _POOL_BEFORE:
            x = F.max_pool2d(x, kernel_size=3, stride=2)
        weight, bias = network[f"features.{index}.weight"], network[f"features.{index}.bias"]
        x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))  # (b, c, h, w)
        unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
        root = (network[f"linear.{index}.weight"] / x[0, 0].numel()).sqrt()  # (c,), w is never negative
        layers.append((unit * root[:, None, None]).flatten(1))
    return layers


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(r, k), (c, k) -> (r, c) float64, on the CPU."""
    # |a|² + |b|² - 2ab loses what near-duplicates differ by unless it is summed in float64, which MPS does not have
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    distances = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=device)
    width = max(1, _PRODUCT // max(len(rows), len(columns)))
    for a, b in zip(rows.split(width, dim=1), columns.split(width, dim=1), strict=True):
        a = a.to(device).double()
        b = a if rows is columns else b.to(device).double()
        lengths = [torch.linalg.vector_norm(part, dim=1).square() for part in (a, b)]
        distances += lengths[0][:, None] + lengths[1] - 2 * a @ b.T
    return distances.clamp(min=0).cpu()
