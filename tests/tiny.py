"""A Stable Diffusion small enough that its gradients can be checked, and a reward to go with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.config import LoraConfig, ModelConfig, ObjectiveConfig
from draftplus.diffusion.methods import gated_steps
from draftplus.diffusion.problem import Problem
from draftplus.diffusion.sampler import Sampler
from draftplus.diffusion.schedule import make_schedule
from draftplus.diffusion.solvers import make_solver
from draftplus.models.stable_diffusion import StableDiffusion, load
from draftplus.models.tuned import Tuned
from draftplus.types import Scores

TOKENIZER = Path(__file__).parents[1] / "src" / "draftplus" / "assets" / "emoji" / "tokenizer"
CPU = torch.device("cpu")
SHAPE = (4, 8, 8)  # of one image's latents
PROMPTS = ["a cat", "a dog on a blue background", "a bee"]

# as in Stable Diffusion 1.5
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """Saves a randomly initialised pipeline in the diffusers layout."""
    tiny_pipeline(seed).save_pretrained(directory)
    return directory


def tiny_pipeline(seed: int = 0) -> Any:
    """A stock pipeline with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=16, scaling_factor=0.5,
        )  # fmt: skip
        text = CLIPTextConfig(
            vocab_size=1536, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=1534, eos_token_id=1535, pad_token_id=1535,
        )  # fmt: skip
        encoder = CLIPTextModel(text)
        for name, parameter in unet.named_parameters():
            if "attn2" in name and parameter.ndim > 1:
                parameter.data *= 3  # so that the prompt, and with it guidance, matters
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stock_pipeline(directory: Path, dtype: torch.dtype = torch.float64, scheduler: Any = None) -> Any:
    """The stock pipeline of a directory, with another scheduler if given."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(directory, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def tiny_model(
    directory: Path, dtype: torch.dtype = torch.float64, lora: LoraConfig | None = None, full: bool = False,
    trainable: bool = True, **settings: Any,
) -> StableDiffusion:  # fmt: skip
    """The model under test: LoRA on every layer (alpha = 2 x rank), or fully tuned."""
    adapters = None if full else lora or LoraConfig(rank=2, alpha=4.0, targets="all")
    config = ModelConfig(path=str(directory), lora=adapters, **settings)
    key = (config, dtype, trainable)
    kept = next((made for known, made in _LOADED if known == key), None)
    if kept is None:
        kept = load(config, str(directory), CPU, trainable=trainable, dtype=dtype)
        _LOADED.append((key, kept))
    # a copy takes a tenth of the time of loading once more
    tuned = Tuned(copy.deepcopy(kept.unet), kept.tuned.pipeline, copy.deepcopy(kept.tuned.frozen))
    return StableDiffusion(
        tuned, copy.deepcopy(kept.vae), copy.deepcopy(kept.text_encoder), kept.tokenizer, kept.scheduler_config
    )


_LOADED: list[tuple[Any, StableDiffusion]] = []


def randomize(model: StableDiffusion, seed: int = 1, size: float = 0.1) -> None:
    """Moves every trained tensor: LoRA's B away from zero, a full denoiser away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.tuned.trainable().items():
        if "lora_A" not in name:
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += size * step * (1.0 if "lora_B" in name else parameter.data.std().nan_to_num() + 0.01)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """float64 standard normal draws."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_source(b: int, shape: Sequence[int] = SHAPE) -> Any:
    """(stream, draw) -> float64 noise of b images, different for each stream and draw."""

    def noise(stream: str, draw: int) -> Tensor:
        return normal(b, *shape, seed=sum(map(ord, stream)) * 1000 + draw)

    return noise


class TinyScorer:
    """A smooth reward whose weights are different for every prompt."""

    differentiable = True

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        rows = []
        for image, prompt in zip(images, prompts, strict=True):
            weight = normal(*image.shape, seed=sum(map(ord, prompt))).to(image)
            rows.append((weight * torch.tanh(4 * (image - 0.5))).sum() + 5 * image.std())
        return torch.stack(rows)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        total = self.scores(images, prompts)
        return Scores(total, {"tiny": total})


def problem(
    model: Any, objective: ObjectiveConfig, steps: int = 5, guidance_scale: float = 3.0, eta: float = 0.0,
    scheduler: dict[str, Any] | None = None, solver: str = "auto", negative_prompt: str = "",
) -> Problem:  # fmt: skip
    """What the objectives take, around a tiny model."""
    schedule, name = make_schedule(scheduler or SCHEDULER, steps, solver)
    solve = make_solver(name, eta)
    gate = gated_steps(objective.gate, steps)
    sampler = Sampler(model, schedule, solve, guidance_scale, negative_prompt, eta, gate)
    return Problem(sampler, TinyScorer(), objective)


def gradients(parameters: dict[str, nn.Parameter], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a scalar in each parameter, by name; zeros where it does not depend on it."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }
