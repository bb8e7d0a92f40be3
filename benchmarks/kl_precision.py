"""What the KL term and its gradient are in half precision, at Stable Diffusion 1.5's true shape with random weights.

    python benchmarks/kl_precision.py                           # 8x8 latents, on the CPU: minutes
    python benchmarks/kl_precision.py --device cuda --size 64

One adapter, guidance 7.5, one sampling step. For each precision of the frozen weights, with the float32 passes that
training makes for the KL term and without: its value, how far its gradient is from that of the first row (float32)
relative to it, the cosine of the two, the seconds of a pass of each model with the backward pass, and a GPU's peak
memory. On a GPU float32 passes are also made with TF32 in convolutions, as is PyTorch's default, and in all products.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from draftplus.config import LoraConfig, ObjectiveConfig
from draftplus.diffusion.guidance import classifier_free, denoiser
from draftplus.diffusion.regularisers import kl
from draftplus.diffusion.sampler import Visit
from draftplus.diffusion.schedule import make_schedule
from draftplus.models.single_file import CONFIGS
from draftplus.models.stable_diffusion import ATTENTION
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.types import Conditioning

GUIDANCE, STEP, STEPS = 7.5, 25, 50
TF32 = ("", ", TF32 convolutions", ", TF32 everywhere")


def tuned_unet(device: torch.device, moved: float) -> Tuned:
    """The UNet, whose weights float16 and bfloat16 can hold, with an adapter that is `moved` away from its start."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(CONFIGS / "sd1", subfolder="unet")
    unet = UNet2DConditionModel.from_config(config).to(torch.bfloat16).float()
    tuned = make_tuned(
        unet.requires_grad_(False).eval(), StableDiffusionPipeline, LoraConfig(4, 4.0), 0, True, ATTENTION
    )
    for name, parameter in tuned.trainable().items():
        if "lora_B" in name:
            parameter.data.normal_(std=moved)
    unet.to(device)
    return tuned


def penalty(tuned: Tuned, size: int) -> Tensor:
    """The KL term of one image, (), with its gradient."""
    parameters = list(tuned.trainable().values())
    device, generator = parameters[0].device, torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    latents, text, empty = drawn(1, 4, size, size), Conditioning(drawn(1, 77, 768)), Conditioning(drawn(1, 77, 768))
    schedule, _ = make_schedule({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, STEPS)

    def predict(x: Tensor, timestep: Tensor, given: Conditioning) -> Tensor:
        dtype = tuned.network.conv_in.weight.dtype
        raw: Tensor = tuned.network(x.to(dtype), timestep, given.hidden.to(dtype), return_dict=False)[0]
        return raw

    raw = classifier_free(predict, text, empty, GUIDANCE)

    def frozen(x: Tensor, timestep: Tensor) -> Tensor:
        with torch.no_grad(), tuned.reference():
            return raw(x, timestep)

    objective = ObjectiveConfig(kl_coeff=1.0)
    return kl(objective, denoiser(raw, schedule), denoiser(frozen, schedule), Visit(STEP, latents, None))


def measured(tuned: Tuned, dtype: torch.dtype, size: int, wide: bool) -> tuple[float, Tensor, float, float]:
    """Value, gradient (n,), seconds and peak memory in GB, with frozen weights in this precision."""
    trained = {id(parameter) for parameter in tuned.trainable().values()}
    for parameter in tuned.denoiser.parameters():
        parameter.grad = None
        if id(parameter) not in trained:
            parameter.data = parameter.data.to(dtype)
    gpu = next(tuned.denoiser.parameters()).is_cuda
    inside: Any = tuned.widened() if wide else nullcontext()
    with inside:
        if gpu:  # the first call chooses algorithms
            penalty(tuned, size)
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        value = penalty(tuned, size)
        value.backward()
        told = value.item()  # which waits for a GPU
        seconds = time.perf_counter() - began
    gradient = torch.cat([p.grad.flatten() for p in tuned.trainable().values() if p.grad is not None]).double().cpu()
    return told, gradient, seconds, torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=8, help="side of the latents")
    parser.add_argument("--moved", type=float, default=7e-4, help="standard deviation of the adapter's B")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    options = parser.parse_args()
    tuned = tuned_unet(torch.device(options.device), options.moved)
    expected: Tensor | None = None
    gpu = torch.device(options.device).type == "cuda"
    for name, wide in [("float32", False)] + [(name, wide) for name in options.dtypes for wide in (True, False)]:
        if name == "float32" and wide:
            continue
        for tf32 in TF32 if gpu and (wide or name == "float32") else TF32[:1]:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = bool(tf32), tf32 == TF32[2]
            value, gradient, seconds, memory = measured(tuned, getattr(torch, name), options.size, wide)
            expected = gradient if expected is None else expected
            off = float((gradient - expected).norm() / expected.norm())
            cosine = float(torch.nn.functional.cosine_similarity(gradient, expected, 0))
            print(f"{name + ', float32 passes' * wide + tf32:46} KL {value:.3e}   gradient off by {off:.2%}, "
                  f"cosine {cosine:.4f}   {seconds:.2f} s   {memory:.2f} GB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
