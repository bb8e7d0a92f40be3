"""What a step of `draftplus reward train` costs at PickScore's size (CLIP ViT-H/14), in float32 and in bfloat16.

    python -m benchmarks.reward_training                       on one GPU
    python -m benchmarks.reward_training --device cpu --tiny   the same code on a tiny model

Weights and pictures are random. A step: the scores of all pairs in micro-batches, the loss, the backward passes, and
AdamW's update; reading and resizing pictures is left out. Memory is the highest that torch has allocated. The gradient
of bfloat16 is compared with that of float32, of the same weights and pictures. Times are medians, after a step that is
not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.shapes import clip_h
from draftplus.build import quiet_libraries
from draftplus.config import RewardTrainConfig
from draftplus.rewards.clip import EMOJI_CLIP, ClipReward, load_clip_reward
from draftplus.rewards.preference import TOWERS, ClipPreference, preference_loss
from draftplus.training.optim import make_optimizer

PAIRS = 128  # of a step, as PickScore's


def learner(reward: ClipReward, checkpointing: bool) -> ClipPreference:
    """All weights of a reward, ready to learn."""
    reward.model.requires_grad_(True)
    if checkpointing:
        reward.model.gradient_checkpointing_enable({"use_reentrant": False})
        reward.model.train()
    return ClipPreference(reward, {}, tuple(TOWERS))


def gradient(model: ClipPreference, pictures: Tensor, captions: list[str], labels: Tensor, micro: int) -> None:
    """Adds that of a step to the parameters."""
    for begin in range(0, len(captions), micro):
        part = slice(begin, begin + micro)
        scores = model.scores(pictures[part], captions[part])
        (preference_loss(scores, labels[part]).sum() / len(captions)).backward()


def main(options: argparse.Namespace) -> None:
    quiet_libraries()
    device = torch.device(options.device)
    reward = load_clip_reward(EMOJI_CLIP, device=device) if options.tiny else clip_h(device)
    whole = learner(reward, options.checkpointing)
    size, pairs = reward.model.config.vision_config.image_size, options.pairs
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (pairs, 2, 3, size, size), generator=draw).to(torch.uint8)
    captions = [f"a picture of thing number {i}, as somebody might describe it in so many words" for i in range(pairs)]
    labels = torch.randint(0, 2, (pairs,), generator=draw).float().to(device)
    optimizer = make_optimizer(whole.trainable(), RewardTrainConfig().optim)
    exact: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, seconds = replace(whole, precision=dtype), list[float]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in range(options.repeats + 1):
            began = time.perf_counter()
            gradient(model, pictures, captions, labels, options.micro)
            if step == 0:
                found = {name: p.grad.cpu() for name, p in model.trainable().items() if p.grad is not None}
                exact = exact or found
                gap = sum(float((found[name] - exact[name]).double().square().sum()) for name in found)
                length = sum(float(one.double().square().sum()) for one in exact.values())
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # so that both compute with the same weights
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else "memory not known"
        rate = pairs / statistics.median(seconds[1:])
        off = (gap / length) ** 0.5
        print(f"{str(dtype).removeprefix('torch.'):<10}{rate:8.1f} pairs/s   {peak}   gradient off by {off:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the embedded reward instead of a ViT-H/14")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--micro", type=int, default=32, help="pairs in memory at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="model.gradient_checkpointing")
    main(parser.parse_args())
