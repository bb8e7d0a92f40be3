"""The objectives written out from the papers' formulas, with the stock modules alone.

`ByHand.objective(theta, bar)` is the frozen-part function F(theta; theta_bar): whatever an objective stops the gradient
of is evaluated at `bar`. At theta = theta_bar its value is the loss and its derivative in theta the truncated gradient.
Nothing of draftplus is called here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

Theta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An objective. steps: those with gradient; end: how many steps the trajectory has; x0_at: ReFL's, DRTune's end."""

    method: str
    steps: tuple[int, ...]
    kl_coeff: float = 0.0
    kl_space: str = "noise"
    hinge: float | None = None
    x0_at: int | None = None
    copies: int = 2
    eta: float = 0.0


@dataclass
class ByHand:
    """The model of a directory, and how it is sampled."""

    directory: Path
    prompts: Sequence[str]
    reward: Any
    noise: Any
    total: int = 5
    guidance: float = 3.0
    negative: str = ""
    scale: float = 2.0  # alpha / rank
    prediction: str = "epsilon"
    cache: dict[Any, tuple[Theta, list[Tensor]]] = field(default_factory=dict)

    @cached_property
    def modules(self) -> tuple[Any, Any]:
        from diffusers import AutoencoderKL, UNet2DConditionModel

        parts = (
            UNet2DConditionModel.from_pretrained(self.directory / "unet", torch_dtype=torch.float64),
            AutoencoderKL.from_pretrained(self.directory / "vae", torch_dtype=torch.float64),
        )
        for part in parts:
            part.requires_grad_(False).eval()
        return parts

    @cached_property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """(without, with) the prompt, each (b, n, d)."""
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = CLIPTextModel.from_pretrained(self.directory / "text_encoder", dtype=torch.float64).eval()
        tokenizer = CLIPTokenizer.from_pretrained(self.directory / "tokenizer")

        def embed(texts: Sequence[str]) -> Tensor:
            ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                return encoder(ids).last_hidden_state

        return embed([self.negative] * len(self.prompts)), embed(self.prompts)

    def weights(self, theta: Theta) -> dict[str, Tensor]:
        """W + scale * B A for LoRA's theta; theta itself where it holds whole weights."""
        unet = self.modules[0]
        weights = {}
        for name, a in theta.items():
            module, _, rest = name.partition(".lora_A.")
            if not rest:
                if ".lora_B." not in name:
                    weights[name] = a
                continue
            b = theta[name.replace(".lora_A.", ".lora_B.")]
            delta = b.flatten(1) @ a.flatten(1)
            weight = unet.get_parameter(f"{module}.weight")
            weights[f"{module}.weight"] = weight + self.scale * delta.view(weight.shape)
        return weights

    @cached_property
    def bars(self) -> Tensor:
        betas = torch.linspace(sqrt(0.00085), sqrt(0.012), 1000, dtype=torch.float64) ** 2
        return torch.cumprod(1 - betas, 0)

    def level(self, i: int) -> tuple[int, float, float]:
        """Timestep, cumulative alpha there, and after the step: leading spacing with an offset of 1."""
        stride = 1000 // self.total
        t = (self.total - 1 - i) * stride + 1
        return t, float(self.bars[t]), float(self.bars[max(t - stride, 0)])

    def predict(self, weights: Theta, x: Tensor, i: int) -> Tensor:
        """The guided raw prediction, two calls of the stock UNet with some of its weights replaced."""
        unet, t = self.modules[0], torch.tensor(self.level(i)[0])
        without, given = (
            functional_call(unet, weights, (x, t), {"encoder_hidden_states": hidden}).sample
            for hidden in self.embeddings
        )
        return without + self.guidance * (given - without)

    def split(self, raw: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of a raw prediction: DDIM's equation 12, and Salimans and Ho's appendix D for v."""
        _, bar, _ = self.level(i)
        if self.prediction == "v_prediction":
            return sqrt(bar) * x - sqrt(1 - bar) * raw, sqrt(bar) * raw + sqrt(1 - bar) * x
        return (x - sqrt(1 - bar) * raw) / sqrt(bar), raw

    def step(self, raw: Tensor, x: Tensor, i: int, eta: float, stream: str) -> Tensor:
        """DDIM's equations 12 and 16."""
        x0, eps = self.split(raw, x, i)
        _, bar, after = self.level(i)
        deviation = eta * sqrt((1 - after) / (1 - bar)) * sqrt(1 - bar / after) if eta else 0.0
        x = sqrt(after) * x0 + sqrt(1 - after - deviation**2) * eps
        return x + deviation * self.noise(stream, i) if eta else x

    @torch.no_grad()
    def trajectory(self, bar: Theta, eta: float) -> list[Tensor]:
        """x_T … x_0 of the plain sampler, made once for each bar."""
        key = (eta, *(id(tensor) for tensor in bar.values()))
        if key not in self.cache:
            xs, weights = [self.noise("x_T", 0)], self.weights(bar)
            for i in range(self.total):
                xs.append(self.step(self.predict(weights, xs[-1], i), xs[-1], i, eta, "solver"))
            self.cache[key] = (bar, xs)  # holding bar keeps its ids from being used again
        return self.cache[key][1]

    def score(self, latents: Tensor) -> Tensor:
        image = self.modules[1].decode(latents / 0.5).sample
        return self.reward(((image + 1) / 2).clamp(0, 1), self.prompts)

    def objective(self, theta: Theta, bar: Theta, case: Case) -> Tensor:
        """-mean reward + kl_coeff * KL."""
        frozen = self.trajectory(bar, case.eta)
        trained, stopped = self.weights(theta), self.weights(bar)
        visits: list[tuple[Tensor, Tensor, int]] = []  # trained raw prediction, x for the reference, step
        x = frozen[case.steps[0]]
        end = self.total if case.x0_at is None else case.x0_at + 1
        for i in range(case.steps[0], end):
            seen = frozen[i] if case.method == "drtune" else x
            trains = i in case.steps
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                raw = self.predict(trained if trains else stopped, seen, i)
            if trains:
                visits.append((raw, frozen[i], i))
            x = self.split(raw, x, i)[0] if i == case.x0_at else self.step(raw, x, i, case.eta, "solver")
        rewards = [self.score(x)]
        if case.method == "draft_lv":
            last = self.total - 1
            _, cumulative, _ = self.level(last)
            for copy in range(case.copies):
                again = sqrt(cumulative) * frozen[-1] + sqrt(1 - cumulative) * self.noise("draft_lv", copy)
                raw = self.predict(trained, again, last)
                visits.append((raw, again, last))
                rewards.append(self.score(self.step(raw, again, last, case.eta, f"solver/{copy}")))
        reward = torch.stack(rewards).mean(0)
        value = -reward.mean() if case.hinge is None else torch.clamp(case.hinge - reward, min=0).mean()
        return value + case.kl_coeff * self.kl(visits, case.kl_space) if case.kl_coeff else value

    def kl(self, visits: Sequence[tuple[Tensor, Tensor, int]], space: str) -> Tensor:
        """The mean over steps, images and dimensions of (eps_theta - eps_ref)^2, or of the same in x_0."""
        terms = []
        for raw, x, i in visits:
            with torch.no_grad():
                reference = self.predict({}, x, i)
            _, bar, _ = self.level(i)
            # at one x both forms are linear in the raw prediction, with these factors
            if self.prediction == "v_prediction":
                factor = sqrt(bar) if space == "noise" else sqrt(1 - bar)
            else:
                factor = 1.0 if space == "noise" else sqrt(1 - bar) / sqrt(bar)
            terms.append((factor * (raw - reference)) ** 2)
        return torch.stack(terms).mean()
