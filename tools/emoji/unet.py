"""The denoiser, trained on latents computed once, with captions encoded by the frozen text tower."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from data import COLOURS, Pictures, caption, draw_images
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from models import encode, make_scheduler, make_unet
from render import Picture
from safetensors.torch import load_file, save_file
from training import Average, Clock, report, restore, save, set_rate
from transformers import CLIPModel, CLIPTokenizer

BATCH = 16
MEET = 16
PLACEMENTS = 3
EMPTY_SHARE = 0.1
SNR_CAP = 5.0
WEIGHT_CAP = 30.0


@dataclass
class Latents:
    """Encoded images: values (n, 8, 16, 16) in half precision, and the picture and background of each."""

    values: torch.Tensor
    rows: torch.Tensor
    backgrounds: torch.Tensor


@torch.no_grad()
def encode_all(pictures: Pictures, vae: AutoencoderKL, path: Path) -> Latents:
    """Every trained picture on every named background, both ways round, at a few sizes and places."""
    if not path.exists():
        generator = torch.Generator().manual_seed(3_000_000)
        ground = torch.arange(len(COLOURS)).repeat_interleave(2 * PLACEMENTS)
        values, rows = [], torch.tensor(pictures.animals()).repeat_interleave(len(ground))
        grounds = ground.repeat(len(pictures.animals()))
        order = torch.randperm(len(rows), generator=generator)
        rows, grounds = rows[order], grounds[order]
        for chunk, colour in zip(rows.split(32), grounds.split(32), strict=True):
            images = draw_images(pictures, chunk, COLOURS[colour], generator) * 2 - 1
            values.append(vae.encode(images).latent_dist.mode().half())
        tensors = {"values": torch.cat(values).contiguous(), "rows": rows, "backgrounds": grounds}
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return Latents(**load_file(path))


class TextStates:
    """Hidden states of captions, computed once each; there are some ten thousand different ones."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.clip, self.tokenizer = clip, tokenizer
        self.known: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> torch.Tensor:
        new = sorted({text for text in captions if text not in self.known})
        if new:
            for text, states in zip(new, encode(self.clip, self.tokenizer, new)[0], strict=True):
                self.known[text] = states.half()
        return torch.stack([self.known[text] for text in captions]).float()


def weights_of(rows: list[Picture], indices: torch.Tensor) -> torch.Tensor:
    """Animals with many pictures are drawn more often than those with few, but less than in proportion."""
    subjects = [rows[i].subject for i in indices.tolist()]
    counts: dict[str, int] = {}
    for subject in subjects:
        counts[subject] = counts.get(subject, 0) + 1
    return torch.tensor([counts[subject] ** -0.5 for subject in subjects])


def train(
    pictures: Pictures,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    seconds: float,
    rate: float = 1e-3,
) -> None:
    """Train for `seconds` in all (those of the checkpoint included); the rate falls over the last 40%.

    Under torchrun each worker takes its own steps and their weights are averaged every MEET steps: on a busy machine
    two workers of one thread get further than one of two, which waits for the slower thread in every operation.
    """
    workers, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    latents = encode_all(pictures, vae, checkpoint.with_name("latents.safetensors"))
    texts = TextStates(clip, tokenizer)
    unet = make_unet()
    # on a CPU the backward pass of fused attention is slower than plain products at these sizes
    unet.set_attn_processor(AttnProcessor())
    average = Average(unet, decay=0.998**MEET)
    decayed = [p for p in unet.parameters() if p.ndim > 1]
    plain = [p for p in unet.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), fused=True)
    state = restore(checkpoint) or {}
    if state:
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps = state["average"], state["meetings"]
    elif (start_weights := restore(checkpoint.with_name(f"{checkpoint.stem}-start.pt"))) is not None:
        unet.load_state_dict(start_weights["unet"])
        average = Average(unet, decay=average.decay)
    step = first = state.get("step", 0)
    seed = 4_000_000 + step * workers + rank
    generator = torch.Generator().manual_seed(seed)
    source = random.Random(seed)
    weights = weights_of(pictures.rows, latents.rows)
    alphas = make_scheduler().alphas_cumprod
    clock = Clock(seconds, state.get("seconds", 0.0))
    saved = start = clock.used
    recent = torch.zeros(4)

    def checkpoint_now() -> None:
        state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
        save(checkpoint, state | {"step": step, "meetings": average.steps, "seconds": clock.used})
        average.swap()
        save(checkpoint.with_name(f"{checkpoint.stem}-average.pt"), {"unet": unet.state_dict(), "seconds": clock.used})
        average.swap()

    while clock.progress < 1 or step % MEET:
        set_rate(optimizer, clock.rate(rate, step, warmup=300))
        chosen = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        captions = [
            "" if source.random() < EMPTY_SHARE else caption(pictures.rows[row], ground, source)
            for row, ground in zip(latents.rows[chosen].tolist(), latents.backgrounds[chosen].tolist(), strict=True)
        ]
        clean = latents.values[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        # one draw in each of BATCH equal parts of the noise levels: less noise in the gradient
        parts = torch.arange(BATCH) + torch.rand(BATCH, generator=generator)
        timesteps = (parts * 1000 / BATCH).long().clamp_max(999)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        states = texts(captions)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, timesteps, states).sample
        errors = (predicted.float() - noise).pow(2).mean((1, 2, 3))
        loss = (errors * ((snr + 1).clamp_max(SNR_CAP) / snr).clamp_max(WEIGHT_CAP)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        clock.tick()
        if step % MEET == 0:
            meet(unet, clock, workers)
            average.update()
        # in thirds and quarters of the schedule the loss says more than as one number
        recent.lerp_(errors.detach().view(4, -1).mean(1), 0.02 if step - first > 50 else 1 / (step - first))
        if rank == 0 and step % 48 == 0:
            speed = (step - first) * BATCH * workers / (clock.used - start)
            quarters = {f"e{i}": value for i, value in enumerate(recent.tolist())}
            report("unet", clock, step, speed, loss=loss.item(), **quarters)
        if rank == 0 and step % MEET == 0 and clock.used - saved > 120:
            checkpoint_now()
            saved = clock.used
    if rank == 0:
        checkpoint_now()


@torch.no_grad()
def meet(unet: torch.nn.Module, clock: Clock, workers: int) -> None:
    """Replace every worker's weights, and its idea of the time, by their mean."""
    if workers == 1:
        return
    parameters = [p.data for p in unet.parameters()]
    flat = torch.cat([p.flatten() for p in parameters] + [torch.tensor([clock.used])])
    dist.all_reduce(flat)
    flat /= workers
    clock.used = flat[-1].item()
    for parameter, values in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))
