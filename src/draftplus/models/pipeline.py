"""What families of models have in common: the parts of a stock pipeline, loaded here, and its denoiser, tuned.

A family is a `Kind`, a file of its own. The stock pipeline embeds prompts and knows its settings; what carries gradient
(predicting, guiding, decoding) is called here on its networks. The denoiser is loaded when it is first used, and the
text encoders when a prompt has to be embedded, so that the two need not lie in memory together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from draftplus.config import ModelConfig, SamplerConfig
from draftplus.diffusion.guidance import classifier_free
from draftplus.errors import UserError
from draftplus.models import loading, stock
from draftplus.models.embedding_store import EmbeddingStore, encoders_hash
from draftplus.models.embeddings import Embeddings
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.progress import Advance
from draftplus.types import Conditioning, Raw

Shape = tuple[int, int, int]
QKVO = ("to_q", "to_k", "to_v", "to_out.0")
DENOISERS = ("unet", "transformer")


def _classifier_free(model: PipelineModel, given: Conditioning, negative: str | None, scale: float) -> Raw:
    return classifier_free(model.predict, given, model.encode([negative]) if scale > 1 else given, scale)


def scaled(pipe: Any, latents: Tensor) -> Tensor:
    """Latents (b, c, h, w) as a KL autoencoder takes them, by the scale and shift of its configuration."""
    config = pipe.vae.config
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


def latent_shape(pipe: Any, height: int | None, width: int | None) -> Shape:
    """(c, h, w) for pixels. None: the size that the denoiser was trained at."""
    default = pipe.default_sample_size * pipe.vae_scale_factor
    sides = multiples(pipe.vae_scale_factor * getattr(pipe, "patch_size", 1), height or default, width or default)
    return denoiser_of(pipe).config.in_channels, *(side // pipe.vae_scale_factor for side in sides)


def multiples(factor: int, height: int, width: int) -> tuple[int, int]:
    """The sides. Raises UserError unless both are multiples of `factor` pixels."""
    for key, pixels in (("height", height), ("width", width)):
        if pixels % factor:
            raise UserError(f"sampler.{key} is {pixels}; it must be a multiple of {factor} for this model")
    return height, width


def shift_of(pipe: Any, tokens: int) -> float:
    """mu, by which dynamic shifting follows the size of the image. tokens: of the denoiser."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return float(calculate_shift(tokens, *(pipe.scheduler.config[name] for name in names)))


def token_counts(pipe: Any, prompt: str, limits: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """How many tokens a prompt has for each tokenizer of the pipeline, and how many are read.

    limits: of tokenizers whose own limit is not what the pipeline reads.
    """
    counts = {}
    for name in (name for name in pipe.config if name.startswith("tokenizer") and getattr(pipe, name) is not None):
        tokenizer = getattr(pipe, name)
        counts[name] = len(tokenizer(prompt).input_ids), (limits or {}).get(name, tokenizer.model_max_length)
    return counts


def evenly_spaced(steps: int) -> list[float]:
    """The levels that stock pipelines of flow models give where their user gives none: from 1 to 1 / steps."""
    return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()


def _own_scheduler(pipe: Any, config: Mapping[str, Any], shape: Shape, steps: int) -> Mapping[str, Any]:
    return config


def _nothing_to_check(pipe: Any, sampler: SamplerConfig) -> None:
    pass


def _accept(config: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Kind:
    """What a family has of its own. In what follows, `pipe` is its stock pipeline.

    label: its name for people. pipeline: the class in diffusers. networks: the classes that each of its folders may
    hold, the usual one first; optional: the folders that a model may lack. embed: (pipe, prompt) -> one row; None is
    the stock pipeline's negative prompt where none is given. predict: (pipe, network, latents (b, c, h, w), timestep,
    conditioning) -> the raw prediction, of that shape; all floating-point inputs in the network's precision. guided:
    `Model.guided`. to_vae, decoded: latents as the autoencoder takes them, and its images (b, 3, H, W) in [-1, 1].
    shape, scheduler, noise_dtype: as in `Model`, the last as the stock pipeline of a precision draws it. targets: the
    layers that LoRA calls "attention". accepts: (configuration by folder) raises UserError for what the family does not
    support, before any weights are read. check: the same for settings of the sampler. lengths: (pipe, prompt) -> by
    tokenizer, the number of tokens and of those that are read. large_encoders: whether prompts are kept on disk, and
    encoders let go once all are embedded.
    """

    label: str
    pipeline: str
    networks: Mapping[str, tuple[str, ...]]
    embed: Callable[[Any, str | None], Conditioning]
    predict: Callable[[Any, Any, Tensor, Tensor, Conditioning], Tensor]
    guided: Callable[[PipelineModel, Conditioning, str | None, float], Raw] = _classifier_free
    to_vae: Callable[[Any, Tensor], Tensor] = scaled
    decoded: Callable[[Any, Tensor], Tensor] = lambda pipe, z: pipe.vae.decode(z, return_dict=False)[0]
    shape: Callable[[Any, int | None, int | None], Shape] = latent_shape
    scheduler: Callable[[Any, Mapping[str, Any], Shape, int], Mapping[str, Any]] = _own_scheduler
    noise_dtype: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    targets: Sequence[str] = QKVO
    accepts: Callable[[Mapping[str, Any]], None] = _accept
    check: Callable[[Any, SamplerConfig], None] = _nothing_to_check
    lengths: Callable[[Any, str], Mapping[str, tuple[int, int]]] = token_counts
    optional: Sequence[str] = ()
    large_encoders: bool = True

    @property
    def component(self) -> str:
        """The denoiser's name in the stock pipeline."""
        return next(name for name in self.networks if name in DENOISERS)


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a stock pipeline."""
    return getattr(pipe, next(name for name in DENOISERS if hasattr(pipe, name)))


class PipelineModel:
    """A `Model`: the stock pipeline of a kind, and its denoiser as it is tuned.

    pipe: the stock pipeline; its denoiser has no weights (the meta device) until `tuned` is asked for. encoders: the
    names of its text encoders. read: reads a network by its name.
    """

    def __init__(
        self, kind: Kind, pipe: Any, encoders: Sequence[str], read: Callable[[str], Any], tune: Callable[[Any], Tuned],
        scheduler_config: Mapping[str, Any], device: torch.device, dtype: torch.dtype,
        store: EmbeddingStore | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.pipe, self.scheduler_config, self.device = kind, pipe, scheduler_config, device
        self.noise_dtype = kind.noise_dtype(dtype)
        self._names, self._read, self._tune = encoders, read, tune
        self._encoders: dict[str, Any] = {}  # those that are loaded
        self.encode = Embeddings(self._embed, self._encoders_state, store)

    @cached_property
    def tuned(self) -> Tuned:
        tuned = self._tune(self._read(self.kind.component))
        setattr(self.pipe, self.kind.component, tuned.denoiser)
        tuned.encoders, tuned.open_encoders = self._encoders, self._open
        return tuned

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    def _encoders_state(self) -> Hashable:
        return self.tuned.encoders_state() if "tuned" in vars(self) else None  # which must not load the denoiser

    def _embed(self, prompt: str | None) -> Conditioning:
        self._open()
        for name, (tokens, limit) in self.kind.lengths(self.pipe, prompt or "").items():
            self.encode.cut(tokens, limit, name)
        return self.kind.embed(self.pipe, prompt)

    def prepare(self, prompts: Sequence[str | None], advance: Advance, share: tuple[int, int] = (0, 1)) -> None:
        if self.encode.prepare(prompts, advance, share):
            for name in list(self._encoders):
                del self._encoders[name]
                setattr(self.pipe, name, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _open(self) -> None:
        for name in self._names:
            if name not in self._encoders:
                self._encoders[name] = self._read(name)
                setattr(self.pipe, name, self._encoders[name])

    def latent_shape(self, height: int | None = None, width: int | None = None) -> Shape:
        return self.kind.shape(self.pipe, height, width)

    def scheduler(self, shape: Shape, steps: int) -> Mapping[str, Any]:
        return self.kind.scheduler(self.pipe, self.scheduler_config, shape, steps)

    def check(self, sampler: SamplerConfig) -> None:
        self.kind.check(self.pipe, sampler)

    def guided(self, given: Conditioning, negative: str | None, scale: float) -> Raw:
        return self.kind.guided(self, given, negative, scale)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The raw prediction without guidance. latents: (b, c, h, w), timestep: () or (b,). Returns (b, c, h, w)."""
        network = self.tuned.network
        dtype = precision_of(network)
        return self.kind.predict(self.pipe, network, latents.to(dtype), timestep, conditioning.to(dtype))

    def decode(self, latents: Tensor) -> Tensor:
        dtype = self.vae.dtype
        image = self.kind.decoded(self.pipe, self.kind.to_vae(self.pipe, latents).to(dtype))
        image = image + 0 * image  # an overflow becomes NaN, where clamp would make white or black of it
        return (image.to(torch.promote_types(torch.float32, dtype)) / 2 + 0.5).clamp(0, 1)

    def blocks(self) -> Sequence[nn.Module]:
        names = self.tuned.denoiser._no_split_modules
        return [module for module in self.tuned.denoiser.modules() if type(module).__name__ in names]


def precision_of(network: nn.Module) -> torch.dtype:
    """The precision of a network's own weights, whatever that of its adapters."""
    return next(p.dtype for name, p in network.named_parameters() if "lora_" not in name)


def load_pipeline(
    kind: Kind, config: ModelConfig, path: str, device: torch.device, seed: int = 0, trainable: bool = True,
    dtype: torch.dtype | None = None,
) -> PipelineModel:  # fmt: skip
    """Loads a model of a kind, ready to be trained or, if not `trainable`, to be sampled.

    path: diffusers directory or hub id. dtype: of frozen weights, instead of the configuration's; trained weights, and
    the frozen copy of a fully tuned denoiser, are in at least float32.

    Raises UserError for a missing model, one of another family, or weights that would run code.
    """
    frozen = dtype or getattr(torch, config.dtype)
    with loading.loading("model.path", path, kind.label):
        source, there = stock.source(kind, config, path)
        pipe = stock.without_weights(kind, source, there, frozen)

    def read(name: str) -> Any:
        with loading.loading("model.path", path, kind.label):
            network = loading.load_part(there[name], source, name, frozen)
        network.requires_grad_(False).eval().to(device)
        return network

    def tune(denoiser: Any) -> Tuned:
        tuned = make_tuned(denoiser, kind.component, config.lora, seed, trainable, kind.targets)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return tuned

    pipe.vae = read("vae")
    if loading.decodes_in_float32(pipe.vae):
        pipe.vae.to(torch.float32)
    if config.gradient_checkpointing:
        pipe.vae.enable_gradient_checkpointing()
    encoders = [name for name in there if name.startswith("text_encoder")]
    store = None
    if kind.large_encoders:
        folders = [*encoders, *(name for name in stock.index_of(source.directory) if name.startswith("tokenizer"))]
        told = {"family": kind.label, "encoders": encoders_hash(source, path, folders), "dtype": str(frozen)}
        store = EmbeddingStore(told, device)
    return PipelineModel(
        kind, pipe, encoders, read, tune, stock.scheduler_config(source.directory), device, frozen, store
    )
