"""The table of docs/rewards.md: how exact each built-in reward is, and what it costs at its true size. Linux only.

    OMP_NUM_THREADS=1 python -m benchmarks.rewards                  some minutes, and 8 GiB of memory for ViT-H
    OMP_NUM_THREADS=1 python -m benchmarks.rewards hpsv2 aesthetic

Weights are random and laid out as the published files are; nothing is downloaded. Exit status 1 if a memory differs by
more than 15% from what docs/rewards.md says.

- parity: the largest difference from the original's scores, which tests/parity/rewards/ keeps, on small weights, as a
  share of their range; where nothing is resized, and where the original resizes 8-bit pictures through PIL.
- gradient: the derivative in a random direction against a central difference in float64, relative.
- weights: what loading adds to the resident memory. picture: the highest resident memory while a picture of 512 pixels
  is scored and its gradient taken, above that (VmHWM, set back by /proc/self/clear_refs). glibc is told to hand every
  freed tensor back, else the number would be of its caches.
- seconds: of one such picture, processor time of one thread, the median of three.

Each number is of a fresh process, one after the other. HPSv3, of 8 billion weights, is not loaded at its true size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import RETURN_MEMORY, status
from draftplus.build import quiet_libraries
from draftplus.rewards import aesthetic, clip, hpsv2, hpsv3, image_reward, mps
from draftplus.types import Reward
from tests.support import originals, published

MIB = 2**10  # of the kB in which Linux counts
TOLERANCE = 0.15
DOCS = Path(__file__).parents[1] / "docs" / "rewards.md"
CLIP_L = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "bos_token_id": 49406, "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A reward. small, published: write weights into a directory, those that the original scored, or random ones of the
    published size, if they fit in memory; load: reads them from there. range, licence: as the table has them."""

    small: Callable[[Path], Any]
    published: Callable[[Path], Any] | None
    load: Callable[..., Reward]
    range: str
    licence: str


def random(shape: Any) -> Tensor:
    """In float16; one in width deviations for matrices, so that features neither vanish nor overflow."""
    if len(shape) < 2:
        return torch.zeros(shape, dtype=torch.float16)
    return (torch.empty(shape).uniform_(-1, 1) * (3 / shape[-1]) ** 0.5).half()


def write_clip(config: dict[str, Any], directory: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = CLIPConfig(**config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CLIPModel(settings).state_dict().items()}
    save_file({name: named(name, shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    settings.save_pretrained(directory)
    CLIPImageProcessorPil().save_pretrained(directory)
    originals.save_tokenizer(directory)


def named(name: str, shape: Any) -> Tensor:
    """Random, but that scales of norms are 1."""
    return torch.ones(shape).half() if re.search(r"(norm\d?|ln_\w+|layrnorm)\.weight$", name) else random(shape)


def small_hpsv2(directory: Path) -> None:
    hpsv2.VIT_H = originals.clip_config()
    tensors = originals.drawn(originals.CLIP_SAYS["names"]["clip"])
    torch.save({"state_dict": tensors}, originals.save_tokenizer(directory) / hpsv2.FILES["v2.1"])


def published_hpsv2(directory: Path) -> None:
    tensors = {name: named(name, shape) for name, shape in originals.published_names().items()}
    torch.save({"state_dict": tensors}, originals.save_tokenizer(directory) / hpsv2.FILES["v2.1"])


def write_head(directory: Path) -> Path:
    tensors = originals.drawn(originals.CLIP_SAYS["names"]["aesthetic"])
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, directory / aesthetic.FILE)
    return directory


def load_aesthetic(directory: Path, dtype: torch.dtype | None = None) -> Reward:
    return aesthetic.load_aesthetic(directory, clip=str(directory), dtype=dtype)


def published_clip_h(directory: Path) -> None:
    write_clip(hpsv2.VIT_H, directory)


def small_aesthetic(directory: Path) -> None:
    write_head(originals.save_clip(directory, "quick_gelu", 768))


def published_aesthetic(directory: Path) -> None:
    write_clip(CLIP_L, write_head(directory))


def published_mps(directory: Path) -> None:
    """With four layers of cross-attention, of 1024 in 16 heads; in float32, as the converted file is."""
    from safetensors.torch import save_file

    write_clip(hpsv2.VIT_H, directory)
    with torch.device("meta"):
        layers = {f"cross_model.layers.{i}.0.fn.to_q.weight": torch.empty(1024, 1024) for i in range(4)}
        shapes = {name: one.shape for name, one in mps.Network(hpsv2.VIT_H, layers).state_dict().items()}
    tensors = {f"mps.{name}": named(name, shape).float() for name, shape in shapes.items()}
    save_file(tensors, directory / mps.FILE)


CASES = {
    "hpsv2": Case(small_hpsv2, published_hpsv2, hpsv2.load_hpsv2, "about 0.2 to 0.35", "Apache-2.0"),
    "pickscore": Case(originals.save_clip, published_clip_h, clip.load_pickscore, "about 20 to 23", "none stated"),
    "clip_h": Case(originals.save_clip, published_clip_h, clip.load_clip_h, "0 to 100, mostly 20 to 40", "MIT"),
    "aesthetic": Case(
        small_aesthetic,
        published_aesthetic,
        load_aesthetic,
        "about 1 to 10, mostly 4 to 7",
        "Apache-2.0; its CLIP: MIT",
    ),
    "image_reward": Case(
        lambda directory: published.save_image_reward(directory, published.image_reward()),
        lambda directory: published.save_image_reward(directory, published.true_size_image_reward()),
        image_reward.load_image_reward,
        "about −2 to 2",
        "Apache-2.0",
    ),
    "hpsv3": Case(published.save_hpsv3, None, hpsv3.load_hpsv3, "about 0 to 12", "MIT; its Qwen2-VL: Apache-2.0"),
    "mps": Case(published.save_mps, published_mps, mps.load_mps, "depends on the prompt", "none stated"),
}


def exactness(name: str, directory: Path) -> dict[str, float]:
    case = CASES[name]
    case.small(directory)
    apart = name in ("image_reward", "hpsv3", "mps")  # whose originals tests/parity/originals/ runs
    found = (published.errors if apart else originals.errors)(name, case.load(directory))
    plain = found.pop(next(iter(found)))
    published.in_double(setattr)
    gradient, difference = originals.slopes(case.load(directory, dtype=torch.float64), 96, 64)
    return {"plain": plain, "resized": max(found.values()), "gradient": abs(gradient / difference - 1)}


def cost(name: str, directory: Path) -> dict[str, float]:
    """Of weights that are in the directory."""
    import transformers  # noqa: F401  # so that its modules do not count

    before = status("VmRSS")
    reward = CASES[name].load(directory)
    weights = status("VmRSS") - before
    picture = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        reward(picture, ["a cat"])  # whose text is embedded now
    seconds, peaks = [], []
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")
        loaded, began = status("VmRSS"), time.process_time()
        (gradient,) = torch.autograd.grad(reward(picture, ["a cat"]).sum(), picture)
        seconds.append(time.process_time() - began)
        peaks.append(status("VmHWM") - loaded)
        if not gradient.isfinite().all() or not gradient.abs().sum() > 0:
            sys.exit(f"{name}: the gradient is not finite, or zero")
    return {"weights": weights / MIB, "picture": statistics.median(peaks) / MIB, "seconds": statistics.median(seconds)}


def in_a_fresh_process(part: str, name: str, directory: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rewards", name, "--part", part, "--directory", directory]
    done = subprocess.run(command, env={**os.environ, **RETURN_MEMORY}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return dict(json.loads(done.stdout))


def measured(name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as published:
        found = in_a_fresh_process("exactness", name, small)
        if CASES[name].published is None:
            return found
        in_a_fresh_process("published", name, published)
        return found | in_a_fresh_process("cost", name, published)


def row(name: str, found: dict[str, float]) -> str:
    case, cost = CASES[name], "– | – | –"
    if "weights" in found:
        cost = f"{found['weights']:,.0f} MiB | {found['picture']:,.0f} MiB | {found['seconds']:.1f} s"
    return (
        f"| `{name}` | {found['plain']:.0e} | {found['resized']:.0e} | {found['gradient']:.0e} | {case.range} | "
        f"{cost} | {case.licence} |"
    )


def off(name: str, found: dict[str, float]) -> list[str]:
    """What the docs say otherwise of memory."""
    if "weights" not in found:
        return []
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")]
    told = [[float(number.replace(",", "")) for number in re.findall(r"([\d,]+) MiB", line)] for line in rows]
    weights, picture = next((numbers for numbers in told if len(numbers) == 2), (0.0, 0.0))
    pairs = {"weights": (weights, found["weights"]), "picture": (picture, found["picture"])}
    return [
        f"{name}: {what} take {now:,.0f} MiB, but docs/rewards.md says {said:,.0f}"
        for what, (said, now) in pairs.items()
        if abs(now / said - 1 if said else 1) > TOLERANCE
    ]


def main(names: list[str]) -> None:
    print("| reward | not resized | resized | gradient | range | weights | a picture | time of a picture | licence |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    wrong = []
    for name in names:
        found = measured(name)
        print(row(name, found), flush=True)
        wrong += off(name, found)
    sys.exit("\n".join(wrong) or None)


def write(name: str, directory: Path) -> dict[str, float]:
    make = CASES[name].published
    assert make is not None
    make(directory)
    return {}


PARTS = {"exactness": exactness, "published": write, "cost": cost}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*CASES, []], help="rewards (default: all)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.part:
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process does, and no other
        print(json.dumps(PARTS[options.part](options.names[0], options.directory)))
    else:
        main(options.names or list(CASES))
