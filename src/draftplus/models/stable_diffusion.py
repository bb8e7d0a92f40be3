"""Stable Diffusion 1.x and 2.x, and everything of their shape, through diffusers and transformers."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from draftplus.config import ModelConfig
from draftplus.errors import UserError
from draftplus.models import lora
from draftplus.models.weights import first_line, read_state_dict, refuse_code
from draftplus.types import Conditioning

CACHE_BYTES = 2**28  # of text embeddings: about 1,100 prompts of Stable Diffusion 1.5


class StableDiffusion:
    """The `Model` of a UNet with one CLIP text encoder and a KL autoencoder.

    `reference_unet` is the frozen copy of a fully tuned denoiser; with LoRA the frozen model is the UNet itself with
    its adapters off.
    """

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler_config: Mapping[str, Any],
        reference_unet: Any = None,
    ) -> None:  # fmt: skip
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler_config = scheduler_config
        self.reference_unet = reference_unet
        self.device = next(unet.parameters()).device
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cached_bytes = 0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        found = {prompt: self._embed(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning(torch.stack([found[prompt] for prompt in prompts]))  # (b, n, d)

    @torch.no_grad()
    def _embed(self, prompt: str) -> Tensor:
        # one prompt at a time: its embedding must not depend, not even in the last bit, on what shared its batch, or a
        # resumed run with an empty cache would leave the uninterrupted one
        if prompt not in self._cache:
            tokens = self.tokenizer(
                [prompt], padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
                return_tensors="pt",
            ).to(self.device)  # fmt: skip
            mask = tokens.attention_mask if getattr(self.text_encoder.config, "use_attention_mask", False) else None
            self._remember(prompt, self.text_encoder(tokens.input_ids, attention_mask=mask)[0][0])
        self._cache.move_to_end(prompt)
        return self._cache[prompt]  # (n, d)

    def _remember(self, prompt: str, hidden: Tensor) -> None:
        self._cache[prompt] = hidden
        self._cached_bytes += hidden.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        sample = self.unet.config.sample_size
        default = (sample, sample) if isinstance(sample, int) else sample
        sides = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is not None and pixels % factor:
                raise UserError(f"sampler.{name} is {pixels}; this model takes multiples of {factor}")
            sides.append(latent if pixels is None else pixels // factor)
        return self.unet.config.in_channels, sides[0], sides[1]

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.unet.conv_in.weight.dtype
        hidden = conditioning.hidden.to(dtype)
        raw: Tensor = self.unet(latents.to(dtype), timestep, encoder_hidden_states=hidden, return_dict=False)[0]
        return raw

    def decode(self, latents: Tensor) -> Tensor:
        config, dtype = self.vae.config, self.vae.post_quant_conv.weight.dtype
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        image = self.vae.decode(latents.to(dtype), return_dict=False)[0]
        return (image.to(torch.promote_types(torch.float32, dtype)) / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.reference_unet is None:
            with lora.adapters_off(self.unet):
                yield
            return
        tuned, self.unet = self.unet, self.reference_unet
        try:
            yield
        finally:
            self.unet = tuned

    @contextmanager
    def folded(self) -> Iterator[None]:
        with lora.folded(self.unet):
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        return lora.trained(self.unet)

    def save_adapter(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if lora.layers(self.unet):
            state = {f"unet.{name}": tensor for name, tensor in lora.export(self.unet).items()}
            save_file(state, directory / lora.LORA_FILE, metadata={"format": "pt"})
        else:
            self.unet.save_pretrained(directory)

    def load_adapter(self, directory: Path) -> None:
        if (directory / lora.LORA_FILE).is_file():
            lora.attach(self.unet, directory / lora.LORA_FILE)
        elif (directory / "config.json").is_file():
            weights = _denoiser_weights(directory)
            self.reference_unet = self.reference_unet or copy.deepcopy(self.unet)
            self.unet.to(torch.promote_types(torch.float32, self.unet.dtype))  # tuned weights are not rounded
            try:
                self.unet.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(f"{directory}: not a denoiser of this model: {first_line(error)[:200]}") from None
        else:
            raise UserError(
                f"{directory}: no {lora.LORA_FILE} and no denoiser in it; give an adapter/ directory of a run"
            )

    def set_lora_scale(self, scale: float) -> None:
        if scale != 1 and self.reference_unet is not None:
            raise UserError(
                f"the adapter's scale is {scale}, but these weights are a fully tuned denoiser; "
                "blend it with the base model by annealing instead, such as --anneal linear"
            )
        lora.set_scale(self.unet, scale)


def load(
    config: ModelConfig, path: str, device: torch.device, seed: int = 0, trainable: bool = True,
    dtype: torch.dtype | None = None,
) -> StableDiffusion:  # fmt: skip
    """Loads a model of the Stable Diffusion 1.x/2.x family, ready to be trained or, if not `trainable`, to be sampled.

    path: diffusers directory, hub id, or a single .safetensors/.ckpt file. dtype: of frozen weights, instead of the
    configuration's; trained weights, and the frozen copy of a fully tuned denoiser, are in at least float32.

    Raises UserError for a missing model, one of another family, or weights that would run code.
    """
    frozen = dtype or getattr(torch, config.dtype)
    unet, vae, text_encoder, tokenizer, scheduler_config = _components(config, path, frozen)
    _refuse_other_families(path, unet.config, vae.config, text_encoder.config)
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().to(device)
    reference = None
    if trainable and config.lora is not None:
        lora.add_lora(unet, config.lora, seed)
    elif trainable:
        unet.to(torch.promote_types(torch.float32, frozen))
        reference = copy.deepcopy(unet)  # in the trained precision, or their KL would start at the rounding's
        unet.requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    return StableDiffusion(unet, vae, text_encoder, tokenizer, scheduler_config, reference)


def _refuse_other_families(path: str, unet: Any, vae: Any, text: Any) -> None:
    plain = unet.addition_embed_type in (None, "text") and unet.encoder_hid_dim_type is None
    if not plain or unet.in_channels != vae.latent_channels or unet.cross_attention_dim != text.hidden_size:
        raise UserError(f"model.path '{path}' is not a text-to-image model of the Stable Diffusion 1.x/2.x family")


def _components(config: ModelConfig, path: str, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    path = os.path.expanduser(path)  # keeps a leading ./
    if path.endswith((".safetensors", ".ckpt")):
        for key in ("denoiser", "vae", "revision"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"model.{key} cannot be set beside a single file, '{path}'; convert that to a directory"
                )
        return _single_file(path, dtype)
    if _looks_local(path) and not Path(path).is_dir():
        raise UserError(f"model.path '{path}': no such directory; give a diffusers directory, a hub id, or emoji")
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(f"model.path '{path}': no model_index.json in it, so it is not a diffusers model directory")
        refuse_code(Path(path))
    hub: dict[str, Any] = {"revision": config.revision}
    with _loading("model.path", path):
        unet = _part(UNet2DConditionModel, config.denoiser, path, "unet", {"torch_dtype": dtype}, hub)
        vae = _part(AutoencoderKL, config.vae, path, "vae", {"torch_dtype": dtype}, hub)
        text_encoder = _part(CLIPTextModel, None, path, "text_encoder", {"dtype": dtype}, hub)
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", **hub)
        if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # transformers makes do without any file
            raise ValueError("its tokenizer has no vocabulary")
        scheduler_config = DDIMScheduler.load_config(path, subfolder="scheduler", **hub)
    return unet, vae, text_encoder, tokenizer, scheduler_config


def _part(
    cls: Any, replacement: str | None, path: str, name: str, dtype: dict[str, torch.dtype], hub: dict[str, Any]
) -> Any:
    if replacement is None:
        return _whole(*cls.from_pretrained(path, subfolder=name, output_loading_info=True, **dtype, **hub))
    given, key = Path(replacement).expanduser(), "model.denoiser" if name == "unet" else f"model.{name}"
    if not given.exists():
        raise UserError(f"{key} '{replacement}': no such file or directory")
    if given.is_dir():
        refuse_code(given)
        with _loading(key, replacement):
            return _whole(*cls.from_pretrained(given, output_loading_info=True, **dtype))
    state = read_state_dict(given)
    with _loading(key, replacement):
        part = cls.from_single_file(state, config=path, subfolder=name, **dtype)
        return _whole(part, {"missing_keys": [key for key, p in part.named_parameters() if p.is_meta]})


def _whole(part: Any, info: Mapping[str, Any]) -> Any:
    # the loaders fill in what a file lacks with random numbers, or leave it empty
    if info["missing_keys"]:
        raise ValueError(f"its weights lack '{min(info['missing_keys'])}'")
    return part


@contextmanager
def _loading(key: str, value: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # those of four libraries have no base class in common
        hint = ""
        if isinstance(error, OSError) and not Path(value).expanduser().is_dir():
            hint = " (what is not on this disk comes from the hub, which needs the network or an earlier download)"
        raise UserError(
            f"{key} '{value}': not loaded as Stable Diffusion 1.x/2.x: {first_line(error)}{hint}"
        ) from error


def _single_file(path: str, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    from diffusers import StableDiffusionPipeline

    if not Path(path).is_file():
        raise UserError(f"model.path '{path}': no such file")
    read_state_dict(Path(path))  # refuses a pickle that needs code before any other loader sees it
    with _loading("model.path", path):
        pipe = StableDiffusionPipeline.from_single_file(path, torch_dtype=dtype, safety_checker=None)
    return pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler.config


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def _denoiser_weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no .safetensors weights in it")
    return {name: tensor for file in files for name, tensor in read_state_dict(file).items()}
