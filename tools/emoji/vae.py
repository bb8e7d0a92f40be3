"""The autoencoder: encoder and decoder together, then the decoder alone on fixed, whitened latents."""

from __future__ import annotations

from pathlib import Path

import torch
from data import COLOURS, Pictures, draw_images, random_rows
from diffusers import AutoencoderKL
from models import make_vae
from perceptual import Perceptual
from training import Average, Clock, report, restore, save, set_rate

BATCH = 8
KL_WEIGHT = 1e-7
LPIPS_WEIGHT = 0.3
NOISE = 0.1


def train(pictures: Pictures, lpips: Path, checkpoint: Path, seconds: float) -> None:
    """Train encoder and decoder for `seconds` in all, then fold a whitening of the latents into their meeting layers.

    From then on the encoder is fixed, and latents have mean 0 and unit covariance (scaling_factor 1).
    """
    state = restore(checkpoint) or {}
    if state.get("whitened"):
        return
    vae = make_vae()
    if state:
        vae.load_state_dict(state["vae"])
    _run("vae", vae, vae, pictures, lpips, checkpoint, seconds, state)
    whiten(vae, pictures, pictures.animals(held_out=None))
    save(checkpoint, {"whitened": True, "vae": vae.state_dict()})
    save(_averaged(checkpoint), {"vae": vae.state_dict()})


def train_decoder(pictures: Pictures, lpips: Path, checkpoint: Path, seconds: float) -> None:
    """Train the decoder alone for `seconds` in all, on the encoder's fixed latents: colours and edges still sharpen."""
    state = restore(checkpoint)
    if state is None or not state.get("whitened"):
        raise FileNotFoundError(f"no finished autoencoder at {checkpoint}: run the vae stage first")
    vae = make_vae()
    vae.load_state_dict(state["vae"])
    trained = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _run("decoder", vae, trained, pictures, lpips, checkpoint, seconds, state)


def _run(
    stage: str,
    vae: AutoencoderKL,
    trained: torch.nn.Module,
    pictures: Pictures,
    lpips: Path,
    checkpoint: Path,
    seconds: float,
    state: dict,
) -> None:
    """The training loop of both; leaves the averaged weights in `vae`."""
    alone = trained is not vae
    perceptual, average = Perceptual(lpips), Average(trained)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    clock = Clock(seconds, state.get("seconds", 0.0))
    step = first = state.get("step", 0)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps = state["average"], step
    generator = torch.Generator().manual_seed(1_000_000 + step)
    animals, others = pictures.animals(held_out=None), pictures.others()
    saved = start = clock.used

    def checkpoint_now() -> None:
        values = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
        save(checkpoint, values | {"seconds": clock.used, "step": step, "whitened": alone})
        if alone:
            average.swap()
            save(_averaged(checkpoint), {"vae": vae.state_dict()})
            average.swap()

    while clock.progress < 1:
        set_rate(optimizer, clock.rate(1e-3 if alone else 2e-3, step))
        images = _batch(pictures, animals, others, generator)
        with torch.set_grad_enabled(not alone), torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        # a little more noise than the posterior's, since the denoiser's latents are never exact
        spread = NOISE if alone else NOISE + posterior.std
        latents = posterior.mode() + spread * torch.randn(posterior.mean.shape, generator=generator)
        original = images / 2 + 0.5
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decode(latents).sample.float() / 2 + 0.5
            distance = perceptual(output, original).mean()
        l1 = (output - original).abs().mean()
        loss = l1 + LPIPS_WEIGHT * distance
        if not alone:
            loss = loss + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.update()
        step += 1
        clock.tick()
        if step % 100 == 0:
            speed = (step - first) * BATCH / (clock.used - start)
            report(stage, clock, step, speed, l1=l1.item(), lpips=distance.item(), std=latents.std().item())
        if clock.used - saved > 120:
            checkpoint_now()
            saved = clock.used
    checkpoint_now()
    average.swap()


def _averaged(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-average.pt")


def _batch(pictures: Pictures, animals: list[int], others: list[int], generator: torch.Generator) -> torch.Tensor:
    """Three quarters animals, the rest other subjects; most on named backgrounds, some on any colour; in [-1, 1]."""
    few = BATCH // 4
    rows = torch.cat([random_rows(animals, BATCH - few, generator), random_rows(others, few, generator)])
    colours = torch.rand(BATCH, 3, generator=generator)
    named = torch.rand(BATCH, generator=generator) < 0.6
    colours[named] = COLOURS[torch.randint(len(COLOURS), (int(named.sum()),), generator=generator)]
    return draw_images(pictures, rows, colours, generator, sizes=(50, 54, 56, 58, 62), jitter=4) * 2 - 1


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Pictures, rows: list[int]) -> None:
    """Fold an affine map into quant_conv and post_quant_conv so that latents are centred, uncorrelated, and of unit
    variance; a direction that the decoder hardly reads is made small instead, or the denoiser would have to learn it.

    The posterior's log-variances become a small constant: whitening would turn a diagonal posterior into a full one.
    """
    generator = torch.Generator().manual_seed(7)
    colours = COLOURS[torch.randint(len(COLOURS), (len(rows),), generator=generator)]
    images = draw_images(pictures, torch.tensor(rows), colours, generator) * 2 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    flat = latents.transpose(0, 1).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    quant, post = vae.quant_conv, vae.post_quant_conv
    read = post.weight.double()[:, :, 0, 0] @ vectors @ torch.diag(values.sqrt())
    _, strengths, directions = torch.linalg.svd(read)
    scale = (strengths / (0.2 * strengths.max())).clamp(0.05, 1.0)
    forward = torch.diag(scale) @ directions @ torch.diag(values.rsqrt()) @ vectors.T
    channels = len(mean)
    weight, bias = quant.weight.double()[:channels, :, 0, 0], quant.bias.double()[:channels]
    quant.weight[:channels, :, 0, 0] = (forward @ weight).float()
    quant.bias[:channels] = (forward @ (bias - mean)).float()
    quant.weight[channels:] = 0
    quant.bias[channels:] = -8.0
    weight, bias = post.weight.double()[:, :, 0, 0], post.bias.double()
    post.bias.copy_((bias + weight @ mean).float())
    post.weight[:, :, 0, 0] = (weight @ torch.linalg.inv(forward)).float()
