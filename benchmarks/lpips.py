"""LPIPS of all pairs of images: ours against two ways of comparing them pair by pair. Exit status 1 above a target.

    python benchmarks/lpips.py                 100 images of 64 pixels, one thread: about a minute
    python benchmarks/lpips.py --size 512      as Stable Diffusion's; some minutes
    python benchmarks/lpips.py --cpu-time      on a busy machine, with OMP_NUM_THREADS=1
    python benchmarks/lpips.py --memory        also the memory of 100 images of 512 pixels (Linux)

- each pair: the definition, as the public packages compute it. Two images pass through the network and their
  features are compared, 64 pairs a batch. n(n - 1) passes of an image.
- cached: the features of every image are computed once and kept; then they are compared pair by pair, layer by layer.
- in batches: the same, an image with up to 64 others at once; it has no target.
- ours: `draftplus.pairwise_lpips`. n passes, and one matrix product for each slice of the features.

All in one process, interleaved, medians of the repeats, 32-bit network passes in all three. The definition is timed on
some of the pairs, drawn at random, and multiplied up to all of them. Both also say how far their distances are from
ours.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from draftplus.metrics.lpips import WEIGHTS, pairwise_lpips

TARGETS = {"each pair": 20.0, "cached": 3.0}
LARGEST_DIFFERENCE = 1e-5
LARGEST_MEMORY = 3.0  # GB
PAIRS_PER_PASS = 64


def pictures(count: int, size: int) -> Tensor:
    """Smooth random images with some noise, two of them nearly the same: (count, 3, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, (size, size), mode="bicubic") + 0.05 * torch.randn(
        count, 3, size, size, generator=generator
    )
    images[1] = images[0] + 1e-3 * torch.randn(3, size, size, generator=generator)
    return images.clamp(0, 1)


def layers(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The five maps of unit-normalised features (b, c, h, w), with the linear weights (c,), written after the paper."""
    weights = network()
    x = (2 * images - 1 - images.new_tensor([-0.030, -0.088, -0.188])[:, None, None]) / images.new_tensor(
        [0.458, 0.448, 0.450]
    )[:, None, None]
    found = []
    for index, (stride, padding, pool) in enumerate([(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]):
        x = F.max_pool2d(x, 3, 2) if pool else x
        kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        x = F.relu(F.conv2d(x, kernel, bias, stride, padding))
        found.append((x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10), weights[f"linear.{index}.weight"]))
    return found


@lru_cache
def network() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}


def compared(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """A layer's part of the distances, (b,), of features (b or 1, c, h, w)."""
    return ((first - second).square() * weight[:, None, None]).sum(1).mean((1, 2))


def each_pair(images: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """The distances of some pairs, two passes of the network for each."""
    parts = []
    for start in range(0, len(pairs), PAIRS_PER_PASS):
        first, second = (images[list(index)] for index in zip(*pairs[start : start + PAIRS_PER_PASS], strict=True))
        both = zip(layers(first), layers(second), strict=True)
        parts.append(torch.stack([compared(a, b, weight) for (a, weight), (b, _) in both]).sum(0))
    return torch.cat(parts)


def cached(images: Tensor, at_once: int) -> Tensor:
    """The distances of all pairs in order, from features that are computed once.

    at_once: the images that an image is compared with in one call.
    """
    kept = [layers(images[start : start + 8]) for start in range(0, len(images), 8)]
    whole = [(torch.cat([part[i][0] for part in kept]), kept[0][i][1]) for i in range(5)]
    parts = []
    for row in range(len(images) - 1):
        for start in range(row + 1, len(images), at_once):
            parts.append(sum(compared(f[row : row + 1], f[start : start + at_once], weight) for f, weight in whole))
    return torch.cat(parts)


def measure(count: int, size: int, repeats: int, share: int, cpu_time: bool) -> int:
    """Prints the times and ratios; the number of targets that were missed."""
    images = pictures(count, size)
    every = [(i, j) for i in range(count) for j in range(i + 1, count)]
    total = len(every)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).tolist()
    some = [every[n] for n in order[: min(share, total)]]
    pairwise_lpips(images[:2])  # reads the weights
    each_pair(images, some[:1])
    work: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: pairwise_lpips(images)[tuple(torch.tensor(every).T)],
        "each pair": lambda: each_pair(images, some),
        "cached": lambda: cached(images, 1),
        "in batches": lambda: cached(images, PAIRS_PER_PASS),
    }
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, call in work.items():
            began = clock()
            results[name] = call()
            times[name].append((clock() - began) * (total / len(some) if name == "each pair" else 1))
    kind = "processor" if cpu_time else "wall"
    print(f"{count} images of {size} pixels, {total} pairs; {kind} time, medians of {repeats}; "
          f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}")  # fmt: skip
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"ours       {medians['ours']:9.3f} s")
    missed = 0
    for name in ("each pair", "cached", "in batches"):
        mine = results["ours"][order[: len(some)]] if name == "each pair" else results["ours"]
        ratio, difference = medians[name] / medians["ours"], float((results[name] - mine).abs().max())
        failed = ratio < TARGETS.get(name, 0) or difference > LARGEST_DIFFERENCE
        missed += failed
        notes = [f"{ratio:.1f} times ours"]
        notes += [f"target {TARGETS[name]:g}"] if name in TARGETS else []
        notes += [f"largest difference {difference:.1e}"]
        notes += [f"extrapolated from {len(some)} pairs"] if name == "each pair" and len(some) < total else []
        print(f"{name:10} {medians[name]:9.3f} s, {', '.join(notes)}{'  MISSED' if failed else ''}")
    near = float(results["ours"][0]), float(each_pair(images, [(0, 1)]))
    print(f"the two that are nearly the same: ours {near[0]:.3e}, by definition {near[1]:.3e}")
    return missed


def peak_gigabytes(count: int, size: int) -> float:
    """The highest resident memory of this process while all pairs are compared, the images and Python included."""
    images = pictures(count, size)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    pairwise_lpips(images)
    with open("/proc/self/status") as file:
        peak = next(line for line in file if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e9


def main(count: int, size: int, repeats: int, share: int, memory: bool, cpu_time: bool) -> int:
    missed = measure(count, size, repeats, share, cpu_time)
    if memory:
        peak = peak_gigabytes(100, 512)
        missed += peak > LARGEST_MEMORY
        print(f"memory of 100 images of 512 pixels: {peak:.2f} GB in all (target {LARGEST_MEMORY:g})")
    return int(missed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=64, help="pixels, 64 unless given")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=256, help="pairs that the definition is timed on")
    parser.add_argument("--memory", action="store_true", help="also measure the memory of 100 images of 512 pixels")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time")
    given = parser.parse_args()
    sys.exit(main(given.images, given.size, given.repeats, given.pairs, given.memory, given.cpu_time))
