"""The image-text model: its text tower first, frozen early as the text encoder, then the image tower against it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import COLOURS, Pictures, balanced_weights, caption
from models import IMAGE_SIZE, MEAN, STD, encode, make_clip
from perceptual import Perceptual
from subjects import ANIMALS, BACKGROUNDS, STYLES, prompt
from training import Average, Clock, report, restore, save, set_rate
from transformers import CLIPModel, CLIPTokenizer

BATCH = 64
TEXT_BATCH = 128
ANIMAL_SHARE = 0.75
TARGETS = 192
MAX_SCALE = math.log(50.0)


class Teacher:
    """Principal components of AlexNet features of every picture on white, as it is and flipped.

    The image tower predicts them beside its main task: features learned from photographs carry over to styles in which
    an animal was never seen.
    """

    def __init__(self, pictures: Pictures, lpips: Path, cache: Path) -> None:
        if not cache.exists():
            save(cache, {"targets": self._compute(pictures, lpips)})
        self.targets = torch.load(cache, weights_only=True)["targets"]

    @staticmethod
    def _compute(pictures: Pictures, lpips: Path) -> torch.Tensor:
        perceptual = Perceptual(lpips)
        rows = []
        for rgba in torch.cat([pictures.rgba, pictures.rgba.flip(-1)]).split(64):
            image = rgba[:, :3].float() + (1 - rgba[:, 3:].float())
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                maps = perceptual.features(F.interpolate(image, size=(128, 128), mode="bilinear"))
            pooled = [F.adaptive_avg_pool2d(x.float(), 2).flatten(1) for x in maps[1:]]
            rows.append(torch.cat([F.normalize(x) for x in pooled], 1))
        features = torch.cat(rows)
        features = features - features.mean(0)
        _, _, v = torch.pca_lowrank(features, TARGETS, center=False)
        projected = features @ v
        return (projected / projected.std()).view(2, len(pictures.rows), -1)

    def __call__(self, rows: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        return self.targets[flips.long(), rows]


@dataclass
class Batch:
    images: torch.Tensor
    rows: torch.Tensor
    flips: torch.Tensor
    backgrounds: list[int | None]


def augment(pictures: Pictures, rows: torch.Tensor, generator: torch.Generator) -> Batch:
    """Strongly varied images: scale, place, rotation, colour, blur and noise; a third on unnamed backgrounds."""
    n = len(rows)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    rgba = pictures.rgba[rows].float()
    flips = torch.rand(n, generator=generator) < 0.5
    angle, scale = uniform(-0.25, 0.25), uniform(1.0, 1.5)
    shift = uniform(-1, 1, 2) * (scale - 1).unsqueeze(1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    mirror = 1 - 2 * flips.float()
    theta = torch.stack(
        [torch.stack([cos * mirror, -sin * mirror, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(theta, [n, 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    moved = F.grid_sample(F.avg_pool2d(rgba, 2, 1), grid, align_corners=False)
    alpha = moved[:, 3:]
    mix = torch.eye(3) + 0.12 * torch.randn(n, 3, 3, generator=generator)
    mix[torch.rand(n, generator=generator) < 0.4] = torch.eye(3)
    colour = torch.einsum("nij,njhw->nihw", mix, moved[:, :3]) * uniform(0.85, 1.15, 1, 1, 1)
    picked = torch.randint(len(COLOURS), (n,), generator=generator)
    named = torch.rand(n, generator=generator) < 0.67
    ground = torch.where(named.unsqueeze(1), COLOURS[picked], torch.rand(n, 3, generator=generator))
    images = colour + (1 - alpha) * ground.view(n, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, (uniform(-0.6, 1.0).clamp_min(0)).view(n, 1, 1, 1))
    images = images + 0.06 * uniform(-1, 1, 1, 1, 1).clamp_min(0) * torch.randn(images.shape, generator=generator)
    backgrounds = [int(p) if k else None for p, k in zip(picked.tolist(), named.tolist(), strict=True)]
    return Batch(images.clamp(0, 1), rows, flips, backgrounds)


def normalise(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit image embeddings (b, 128) of images in [0, 1]."""
    pooled = clip.vision_model(normalise(images)).pooler_output
    return F.normalize(clip.visual_projection(pooled).float(), dim=-1)


class Captions:
    """Captions, as text and as what they say: (subject, style, background), -1 where one says nothing."""

    def __init__(self, pictures: Pictures) -> None:
        others = sorted({row.subject for row in pictures.rows if not row.animal})
        self.subjects = {subject: i for i, subject in enumerate([*ANIMALS, *others])}
        said: list[tuple[str, str | None, str | None]] = [(subject, None, None) for subject in self.subjects]
        for animal in ANIMALS:
            said += [(animal, style, None) for style in STYLES]
            said += [(animal, None, ground) for ground in BACKGROUNDS]
            said += [(animal, style, ground) for style in STYLES for ground in BACKGROUNDS]
        self.texts = [prompt(*one) for one in said]
        self.codes = torch.tensor([self.code(*one) for one in said])

    def code(self, subject: str, style: str | None, ground: str | None) -> tuple[int, int, int]:
        grounds = list(BACKGROUNDS)
        return (
            self.subjects[subject],
            STYLES.index(style) if style else -1,
            grounds.index(ground) if ground else -1,
        )

    def of_images(self, pictures: Pictures, batch: Batch) -> torch.Tensor:
        """Codes (b, 3) of images; the background is -1 where it has no name."""
        names = list(BACKGROUNDS)
        rows = [pictures.rows[i] for i in batch.rows.tolist()]
        grounds = [None if b is None else names[b] for b in batch.backgrounds]
        return torch.tensor([self.code(row.subject, row.style, b) for row, b in zip(rows, grounds, strict=True)])


def train_text(pictures: Pictures, tokenizer: CLIPTokenizer, checkpoint: Path, seconds: float) -> None:
    """Train the text tower to tell subjects, styles and backgrounds apart, whatever the wording; then it is frozen."""
    if checkpoint.exists():
        return
    clip, bank = make_clip(tokenizer), Captions(pictures)
    sizes = (len(bank.subjects), len(STYLES) + 1, len(BACKGROUNDS) + 1)
    heads = torch.nn.ModuleList([torch.nn.Linear(clip.config.text_config.hidden_size, size) for size in sizes])
    parameters = [*clip.text_model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    clock, step, source = Clock(seconds), 0, random.Random(0)
    rows = [pictures.rows[i] for i in pictures.animals()], [pictures.rows[i] for i in pictures.others()]
    while clock.progress < 1:
        set_rate(optimizer, clock.rate(1e-3, step, warmup=50))
        texts, codes = [], []
        for _ in range(TEXT_BATCH):
            row = source.choice(rows[source.random() < 0.4])
            text = caption(row, source.randrange(len(BACKGROUNDS)), source)
            named = [word for word in BACKGROUNDS if f" {word} background" in text]
            texts.append(text)
            codes.append(bank.code(row.subject, row.style if " style" in text else None, named[0] if named else None))
        with torch.autocast("cpu", torch.bfloat16):
            pooled = encode(clip, tokenizer, texts)[1]
            logits = [head(pooled).float() for head in heads]
        targets = torch.tensor(codes)
        targets[:, 1:] += 1
        loss = torch.stack([F.cross_entropy(logit, targets[:, i]) for i, logit in enumerate(logits)]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        clock.tick()
        if step % 20 == 0:
            right = [(logit.argmax(1) == targets[:, i]).float().mean().item() for i, logit in enumerate(logits)]
            speed = TEXT_BATCH * step / clock.used
            report("text", clock, step, speed, loss=loss.item(), subject=right[0], style=right[1], ground=right[2])
    save(checkpoint, {"clip": clip.state_dict()})


def train_images(
    pictures: Pictures, lpips: Path, text: CLIPModel, tokenizer: CLIPTokenizer, checkpoint: Path, seconds: float
) -> None:
    """Train image tower, projections and temperature for `seconds` in all against the frozen text tower `text`."""
    state = restore(checkpoint) or {}
    clip, head = make_clip(tokenizer), torch.nn.Linear(text.config.vision_config.hidden_size, TARGETS)
    clip.load_state_dict(state.get("clip", text.state_dict()))
    clip.text_model.requires_grad_(False)
    if state:
        head.load_state_dict(state["head"])
    trained = torch.nn.ModuleList([clip.vision_model, clip.visual_projection, clip.text_projection, head])
    parameters = [*trained.parameters(), clip.logit_scale]
    average = Average(trained)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps = state["average"], state["step"]
    step = first = state.get("step", 0)
    generator = torch.Generator().manual_seed(2_000_000 + step)
    teacher, bank = Teacher(pictures, lpips, checkpoint.with_name("teacher.pt")), Captions(pictures)
    with torch.no_grad():
        chunks = [bank.texts[i : i + 256] for i in range(0, len(bank.texts), 256)]
        pooled_texts = torch.cat([encode(clip, tokenizer, chunk)[1] for chunk in chunks])
    animals, others = torch.tensor(pictures.animals()), torch.tensor(pictures.others())
    weights = balanced_weights(pictures, animals.tolist())
    clock = Clock(seconds, state.get("seconds", 0.0))
    saved = start = clock.used

    def checkpoint_now() -> None:
        values = {"clip": clip.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
        save(checkpoint, values | {"average": average.values, "step": step, "seconds": clock.used})
        average.swap()
        save(checkpoint.with_name(f"{checkpoint.stem}-average.pt"), {"clip": clip.state_dict(), "seconds": clock.used})
        average.swap()

    while clock.progress < 1:
        set_rate(optimizer, clock.rate(1e-3, step))
        count = int(BATCH * ANIMAL_SHARE)
        rows = torch.cat(
            [
                animals[torch.multinomial(weights, count, replacement=True, generator=generator)],
                others[torch.randint(len(others), (BATCH - count,), generator=generator)],
            ]
        )
        batch = augment(pictures, rows, generator)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = clip.vision_model(normalise(batch.images)).pooler_output
            vectors = F.normalize(clip.visual_projection(pooled).float(), dim=-1)
            taught = F.mse_loss(head(pooled).float(), teacher(batch.rows, batch.flips))
            texts = F.normalize(clip.text_projection(pooled_texts).float(), dim=-1)
        logits = clip.logit_scale.exp() * vectors @ texts.T
        loss, accuracy = contrast(logits, bank.of_images(pictures, batch), bank.codes)
        optimizer.zero_grad()
        (loss + taught).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=MAX_SCALE)
        average.update()
        step += 1
        clock.tick()
        if step % 50 == 0:
            speed = (step - first) * BATCH / (clock.used - start)
            report("clip", clock, step, speed, loss=loss.item(), taught=taught.item(), accuracy=accuracy)
        if clock.used - saved > 120:
            checkpoint_now()
            saved = clock.used
    checkpoint_now()


def contrast(logits: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Contrastive loss of images (b) against all captions (m), and the top-1 accuracy of the plain ones.

    Each level of detail (plain, with style, with background, with both) is a choice of its own, so that "a cat" and "a
    cat in flat style" don't compete for the same picture. logits (b, m); images (b, 3) and texts (m, 3) are codes.
    """
    said = texts.unsqueeze(0)
    right = ((said == images.unsqueeze(1)) | (said < 0)).all(-1)
    levels = (texts[:, 1] >= 0).long() + 2 * (texts[:, 2] >= 0).long()
    losses = []
    for level in range(4):
        columns = levels == level
        rows = right[:, columns].any(1)
        chosen = logits[rows][:, columns]
        losses.append(F.cross_entropy(chosen, right[rows][:, columns].long().argmax(1)))
    plain = levels == 0
    accuracy = (logits[:, plain].argmax(1) == right[:, plain].long().argmax(1)).float().mean().item()
    return losses[0] + 0.3 * torch.stack(losses[1:]).sum(), accuracy
