"""A small convolutional classifier of animals and styles: it judges the model and is never a reward."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from clip import augment
from data import COLOURS, Pictures, balanced_weights, draw_images
from subjects import ANIMALS, STYLES
from torch import nn
from training import Clock, report, restore, save, set_rate

BATCH = 64


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Judge(nn.Module):
    """Images (b, 3, 64, 64) in [0, 1] to logits over animals and over styles."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), Block(24, 48, 2), Block(48, 96, 2), Block(96, 192, 2)
        )
        self.animal = nn.Linear(192 * 4, len(ANIMALS))
        self.style = nn.Linear(192 * 4, len(STYLES))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = F.adaptive_avg_pool2d(self.trunk(images * 4 - 2), 2).flatten(1)
        return self.animal(features), self.style(features)


def train(pictures: Pictures, checkpoint: Path, seconds: float) -> None:
    """Train on renders of every animal in every style, held-out pairs included."""
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    state = restore(checkpoint) or {}
    if state:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
    step = first = state.get("step", 0)
    clock = Clock(seconds, state.get("seconds", 0.0))
    start = saved = clock.used
    generator = torch.Generator().manual_seed(5_000_000 + step)
    rows = pictures.animals(held_out=None)
    weights = balanced_weights(pictures, rows)
    animals, styles = labels(pictures)

    def checkpoint_now() -> None:
        state = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict()}
        save(checkpoint, state | {"step": step, "seconds": clock.used})

    while clock.progress < 1:
        set_rate(optimizer, clock.rate(2e-3, step))
        chosen = torch.tensor(rows)[torch.multinomial(weights, BATCH, replacement=True, generator=generator)]
        # half as the model is to draw them, for the styles; half strongly varied, for what it draws badly
        varied, plain = chosen.chunk(2)
        colours = COLOURS[torch.randint(len(COLOURS), (len(plain),), generator=generator)]
        images = torch.cat(
            [augment(pictures, varied, generator).images, draw_images(pictures, plain, colours, generator)]
        )
        animal, style = judge(images)
        loss = F.cross_entropy(animal, animals[chosen]) + 0.5 * F.cross_entropy(style, styles[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        clock.tick()
        if step % 50 == 0:
            right = (animal.argmax(1) == animals[chosen]).float().mean().item()
            styled = (style.argmax(1) == styles[chosen]).float().mean().item()
            speed = (step - first) * BATCH / (clock.used - start)
            report("judge", clock, step, speed, loss=loss.item(), animal=right, style=styled)
        if clock.used - saved > 60:
            checkpoint_now()
            saved = clock.used
    checkpoint_now()


def load(checkpoint: Path) -> Judge:
    state = restore(checkpoint)
    if state is None:
        raise FileNotFoundError(f"no judge at {checkpoint}: run the judge stage first")
    judge = Judge()
    judge.load_state_dict(state["judge"])
    return judge.eval()


def labels(pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Animal and style index of every row; -1 for rows that are no animal."""
    animals = {name: i for i, name in enumerate(ANIMALS)}
    styles = [STYLES.index(row.style) for row in pictures.rows]
    return torch.tensor([animals.get(row.subject, -1) for row in pictures.rows]), torch.tensor(styles)
