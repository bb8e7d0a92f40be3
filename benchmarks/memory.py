"""What a DRaFT+ step takes in memory on the CPU, at the published sizes of models, with random weights. Linux only.

    python -m benchmarks.memory sd15
    python -m benchmarks.memory sdxl            ten minutes on one core, and 20 GiB of memory
    python -m benchmarks.memory sdxl --kl 0
    python -m benchmarks.memory sd15 --size 256 --no-checkpointing

One image of 512 x 512 pixels, K = 1, LoRA of rank 8 on attention, frozen weights in bfloat16, gradient checkpointing of
denoiser and decoder, a reward of PickScore's shape. Memory is the highest resident memory during the step (VmHWM, set
back by /proc/self/clear_refs) less what the loaded model and reward held before. The number of sampling steps does not
change it (benchmarks/step.py measures that), so there is one. glibc is told to hand every freed tensor back, else the
number would be of its caches. Convolutions and linear layers of bfloat16 are computed in float32 and rounded, since
without instructions for them torch takes hours; what is kept for the backward pass stays in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import take_step, training
from benchmarks.gpu import settings
from benchmarks.shapes import SHAPES, build, clip_h
from benchmarks.step import RETURN_MEMORY, status
from draftplus.build import quiet_libraries

GIB = 2**20  # of the kB in which Linux counts
CONVOLUTION, LINEAR = torch.nn.functional.conv2d, torch.nn.functional.linear


class Convolution(torch.autograd.Function):
    """conv2d of bfloat16, through float32; the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rest = rest
        return CONVOLUTION(x.float(), weight.float(), None if bias is None else bias.float(), *rest).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        found = torch.nn.grad.conv2d_input(x.shape, weight.float(), gradients[0].float(), *ctx.rest)
        return found.to(x.dtype), None, None, *(None for _ in ctx.rest)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any) -> Tensor:
    if x.dtype != torch.bfloat16:
        return CONVOLUTION(x, weight, bias, *rest)
    found: Tensor = Convolution.apply(x, weight, bias, *rest)
    return found


class Linear(torch.autograd.Function):
    """linear of bfloat16, through float32; the weights are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return LINEAR(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return (gradients[0].float() @ weight.float()).to(gradients[0].dtype), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype != torch.bfloat16:
        return LINEAR(x, weight, bias)
    found: Tensor = Linear.apply(x, weight, bias)
    return found


def through_float32() -> None:
    """From now on, layers of bfloat16 are computed in float32."""
    functional: Any = torch.nn.functional
    functional.conv2d, functional.linear = conv2d, linear


def peak(model: Any, reward: Any, config: Any) -> tuple[float, float]:
    """GiB of the loaded model and reward, and of a step above that."""
    setup, state = training(config, model, {"pickscore": reward})
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    take_step(setup, state)
    return before / GIB, (status("VmHWM") - before) / GIB


def main(options: argparse.Namespace) -> None:
    quiet_libraries()
    through_float32()
    shape = SHAPES[options.model]
    config = settings(shape, options.size, 1, steps=1, kl=options.kl)
    model = build(shape, config.model.lora, torch.device("cpu"), torch.bfloat16)
    if options.no_checkpointing:
        model.tuned.denoiser.disable_gradient_checkpointing()
        model.vae.disable_gradient_checkpointing()
    reward = clip_h(torch.device("cpu"))
    began = time.perf_counter()
    loaded, above = peak(model, reward, config)
    frozen = sum(p.numel() for p in model.tuned.denoiser.parameters() if p.dtype == torch.bfloat16)
    widened = f", {2 * frozen / 2**30:.2f} GiB of it frozen weights in float32 for the KL term" if options.kl else ""
    print(
        f"{shape.label}, {options.size} pixels, KL {'on' if options.kl else 'off'}, "
        f"gradient checkpointing {'off' if options.no_checkpointing else 'on'}: "
        f"{above:.2f} GiB above the loaded {loaded:.2f} GiB{widened}; {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SHAPES))
    parser.add_argument("--size", type=int, default=512, help="in pixels (default 512)")
    parser.add_argument("--kl", type=float, default=0.1, help="coefficient of the KL term; 0: none (default 0.1)")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations for the backward pass")
    chosen = parser.parse_args()
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process does, and no other
    if not RETURN_MEMORY.items() <= os.environ.items():  # glibc reads them when a process starts
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **RETURN_MEMORY})
    main(chosen)
