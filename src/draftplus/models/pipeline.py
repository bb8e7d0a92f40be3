"""What families of models have in common: the parts of a stock pipeline, loaded here, and its denoiser, tuned.

A family is a `Kind`, a file of its own. The stock pipeline embeds prompts and knows its settings; what carries gradient
(predicting, guiding, decoding) is called here on its networks. The denoiser is loaded when it is first used, and the
text encoders when a prompt has to be embedded, so that the two need not lie in memory together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from draftplus.config import ModelConfig, SamplerConfig
from draftplus.distributed import Offload
from draftplus.errors import needs_memory
from draftplus.models import loading, quantize, stock
from draftplus.models.bare import is_bare, without_content
from draftplus.models.compiling import compile_blocks
from draftplus.models.embedding_store import EmbeddingStore, store_of
from draftplus.models.embeddings import Embeddings
from draftplus.models.kind import Kind, Shape, decodes_in_float32, spare_memory
from draftplus.models.paths import is_single_file
from draftplus.models.tuned import Tuned, make_tuned
from draftplus.progress import Advance
from draftplus.types import Conditioning, Raw


class PipelineModel:
    """A `Model`: the stock pipeline of a kind, and its denoiser as it is tuned.

    pipe: the stock pipeline; its denoiser has no weights (the meta device) until `tuned` is asked for. encoders: the
    names of its text encoders. read: reads a network by its name.
    """

    def __init__(
        self, kind: Kind, pipe: Any, encoders: Sequence[str], read: Callable[[str], Any], tune: Callable[[Any], Tuned],
        scheduler_config: Mapping[str, Any], device: torch.device, dtype: torch.dtype,
        store: EmbeddingStore | None = None, offload: Offload | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.pipe, self.scheduler_config, self.device = kind, pipe, scheduler_config, device
        self.noise_dtype = kind.noise_dtype(dtype)
        self._names, self._read, self._tune = encoders, read, tune
        self._encoders: dict[str, Any] = {}  # those that are loaded
        self.encode = Embeddings(self._embed, self._encoders_state, store)
        self.offload = offload or Offload(device, False)
        self.offload.use(self.vae)

    @cached_property
    def tuned(self) -> Tuned:
        tuned = self._tune(self._read(self.kind.component))
        setattr(self.pipe, self.kind.component, tuned.denoiser)
        tuned.encoders, tuned.open_encoders = self._encoders, self._open
        return tuned

    @property
    def vae(self) -> Any:
        return self.pipe.vae

    @property
    def decoder(self) -> Any:
        return self.vae.decoder

    @property
    def image_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.vae.dtype
        return dtype

    def _encoders_state(self) -> Hashable:
        return self.tuned.encoders_state() if "tuned" in vars(self) else None  # which must not load the denoiser

    def _embed(self, prompt: str | None) -> Conditioning:
        self._open()
        for name, (tokens, limit) in self.kind.lengths(self.pipe, prompt or "").items():
            self.encode.cut(tokens, limit, name.replace("tokenizer", "text_encoder"))
        with needs_memory("the text encoders"):
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
        self.offload.use(*self._encoders.values())

    def latent_shape(self, height: int | None = None, width: int | None = None) -> Shape:
        return self.kind.shape(self.pipe, height, width)

    def scheduler(self, shape: Shape, steps: int) -> Mapping[str, Any]:
        return self.kind.scheduler(self.pipe, self.scheduler_config, shape, steps)

    def check(self, sampler: SamplerConfig) -> None:
        self.kind.check(self.pipe, sampler)

    def guided(self, given: Conditioning, negative: str | None, scale: float) -> Raw:
        return self.kind.guided(self, given, negative, scale)

    def doubles(self, negative: str | None, scale: float) -> bool:
        return self.kind.doubles(self.pipe, negative, scale)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The raw prediction without guidance. latents: (b, c, h, w), timestep: () or (b,). Returns (b, c, h, w)."""
        network, dtype = self.tuned.network, self.tuned.precision
        return self.kind.predict(self.pipe, network, latents.to(dtype), timestep, conditioning.to(dtype))

    def decode(self, latents: Tensor) -> Tensor:
        self.offload.use(self.vae)
        dtype = self.vae.dtype
        with needs_memory(f"decoding {len(latents)} images"):
            image = self.kind.decoded(self.pipe, self.kind.to_vae(self.pipe, latents.to(dtype)))
        image = image + 0 * image  # an overflow becomes NaN, where clamp would make white or black of it
        return (image.to(torch.promote_types(torch.float32, dtype)) / 2 + 0.5).clamp(0, 1)

    def compile(self) -> None:
        compile_blocks(self.tuned.networks(), self.vae, self.device)

    def as_pipeline(self, scheduler: Any = None) -> Any:
        self._open()
        parts = {**self._encoders, self.kind.component: self.tuned.denoiser}
        self.pipe.register_modules(**parts, scheduler=scheduler or self.pipe.scheduler)  # its index names them then
        return self.pipe


def load_pipeline(
    kind: Kind, config: ModelConfig, path: str, device: torch.device, seed: int = 0, trainable: bool = True,
    dtype: torch.dtype | None = None, denoiser_on: torch.device | None = None,
) -> PipelineModel:  # fmt: skip
    """Loads a model of a kind, ready to be trained or, if not `trainable`, to be sampled.

    path: diffusers directory or hub id. dtype: of frozen weights, instead of the configuration's; trained weights, and
    the frozen copy of a fully tuned denoiser, are in at least float32. denoiser_on: where the denoiser is; None: there.
    On the meta device no weights are read.

    Raises UserError for a missing model, one of another family, or weights that would run code.
    """
    frozen, bare = dtype or getattr(torch, config.dtype), is_bare(device)
    quantize.refuse_impossible(config, device, is_single_file(path))
    if bare:
        kind = replace(kind, embed=without_content(kind.embed))
    with loading.loading("model.path", path, kind.label):
        source, there = stock.source(kind, config, path, bare)
        pipe = stock.without_weights(kind, source, there, frozen)

    def read(name: str) -> Any:
        with loading.loading("model.path", path, kind.label), needs_memory(f"loading its {name}"):
            network = loading.load_part(there[name], source, name, frozen)
            network.requires_grad_(False).eval().to(device if name != kind.component else denoiser_on or device)
        return network

    def tune(denoiser: Any) -> Tuned:
        tuned = make_tuned(denoiser, type(pipe), config.lora, seed, trainable, kind.targets)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return tuned

    pipe.vae = read("vae")
    if decodes_in_float32(pipe.vae):
        pipe.vae.to(torch.float32)
    spare_memory(pipe.vae, config, kind.checkpoint)
    offload = Offload(device, config.offload)
    encoders = [name for name in there if name.startswith("text_encoder")]
    store = (
        store_of(kind.label, source, path, frozen, device) if not bare and (kind.large_encoders or offload.on) else None
    )
    told = stock.scheduler_config(source.directory)
    return PipelineModel(kind, pipe, encoders, read, tune, told, device, frozen, store, offload)
