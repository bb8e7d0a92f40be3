"""The trained weights of any denoiser: low-rank adapters, or the whole denoiser next to a frozen copy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from draftplus.config import LoraConfig
from draftplus.distributed.sharding import gathered_as, is_part, plain_class
from draftplus.errors import UserError, first_line
from draftplus.models import lora
from draftplus.models.lora_files import LORA_FILE, lora_file, read_lora
from draftplus.models.quantize import is_quantised, keep_small
from draftplus.weights import read_state_dict, sort_metadata

DENOISER_FILES = "diffusion_pytorch_model{suffix}.safetensors"  # the names that diffusers loads
DENOISER_INDEX = "diffusion_pytorch_model.safetensors.index.json"
LARGEST_FILE = "10GB"
GATE = "draftplus.gate"  # in a file's header, or the index of several files; other programs pass over it


class Tuned:
    """A denoiser and what training changes in it.

    denoiser: the network that is tuned. network: the one to call, which inside `reference` is the frozen model. frozen:
    the frozen copy of a fully tuned denoiser; with adapters, the frozen model is the denoiser itself with them off.
    pipeline: the class of the stock pipeline, which reads LoRA files of every spelling. component: the denoiser's name
    in it, "unet" or "transformer", with which the names in a LoRA file begin. encoders: the text encoders by theirs.
    Training leaves these as they are; a LoRA file of another hand may hold adapters of those that stock gives some.
    open_encoders: loads those that are not in memory. gate: the fraction of the sampling steps, the first ones, that
    the frozen model draws; the files of the weights say so.
    """

    def __init__(self, denoiser: Any, pipeline: Any, frozen: Any = None) -> None:
        self.denoiser, self.frozen, self.pipeline = denoiser, frozen, pipeline
        self.component = pipeline._lora_loadable_modules[0]
        self.encoders: dict[str, Any] = {}
        self.open_encoders: Callable[[], None] = lambda: None
        self.network = denoiser
        self.gate = 0.0
        self._wide = False  # inside `widened`
        self._encoders_now: tuple[int, float, bool] = (0, 1.0, True)  # adapters loaded, their scale, and if they are on

    @contextmanager
    def reference(self) -> Iterator[None]:
        if self.frozen is None:
            before = self._encoders_now
            self._encoders_now = (*before[:2], False)
            try:
                with lora.adapters_off(*self._adaptable().values()):
                    yield
            finally:
                self._encoders_now = before
            return
        before, self.network = self.network, self.frozen
        try:
            yield
        finally:
            self.network = before

    @contextmanager
    def folded(self) -> Iterator[None]:
        with lora.folded(self.denoiser):
            yield

    @property
    def precision(self) -> torch.dtype:
        """In which the network to call computes: that of its own weights, whatever that of its adapters."""
        own = (p for name, p in self.network.named_parameters() if "lora_" not in name)
        dtype = next(p.dtype for p in own if not is_quantised(p))
        return torch.promote_types(torch.float32, dtype) if self._wide else dtype

    @contextmanager
    def widened(self) -> Iterator[None]:
        # a frozen weight is replaced by itself in float32 and rounded back, which is exact both ways: no copy is kept
        narrow = [
            (tensor, tensor.dtype)
            for network in self.networks()
            for tensor in (*network.parameters(), *network.buffers())
            if tensor.dtype in (torch.bfloat16, torch.float16) and not is_quantised(tensor) and not is_part(tensor)
        ]
        with ExitStack() as stack:
            for network in self.networks() if self.precision in (torch.bfloat16, torch.float16) else ():
                stack.enter_context(gathered_as(network, torch.float32))  # where it is sharded
            try:
                for tensor, _ in narrow:
                    tensor.data = tensor.data.float()
                self._wide = True
                yield
            finally:
                self._wide = False
                for tensor, dtype in narrow:
                    tensor.data = tensor.data.to(dtype)

    def merge(self) -> None:
        """Adds adapters to the weights for good; the frozen model is no longer at hand."""
        for network in self._adaptable().values():
            lora.merge(network)

    def trainable(self) -> dict[str, nn.Parameter]:
        return lora.trained(self.denoiser)

    def _adaptable(self) -> dict[str, Any]:
        loadable = self.pipeline._lora_loadable_modules
        encoders = {name: encoder for name, encoder in self.encoders.items() if name in loadable}
        return {self.component: self.denoiser, **encoders}

    def has_adapters(self) -> bool:
        return any(lora.layers(network) for network in self._adaptable().values())

    def encoders_state(self) -> Hashable:
        """A value that changes whenever the embedding of a prompt does."""
        return self._encoders_now if any(lora.layers(encoder) for encoder in self.encoders.values()) else None

    def state(self) -> dict[str, Tensor]:
        if self.has_adapters():
            halves = {name: lora.export(network) for name, network in self._adaptable().items()}
            return {f"{name}.{key}": tensor for name, half in halves.items() for key, tensor in half.items()}
        return dict(self.denoiser.state_dict())

    def write(self, directory: Path, state: Mapping[str, Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        told = {GATE: repr(self.gate)} if self.gate else {}
        if self.has_adapters():
            save_file(dict(state), directory / LORA_FILE, metadata={"format": "pt", **told})
        else:  # not save_pretrained, which would write this process's weights, whatever `state` says
            config = json.loads(self.denoiser.to_json_string()) | {"_class_name": plain_class(self.denoiser).__name__}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (directory / "config.json").write_text(text, encoding="utf-8")
            save_torch_state_dict(
                dict(state), directory, filename_pattern=DENOISER_FILES, max_shard_size=LARGEST_FILE, metadata=told
            )
        for file in directory.glob("*.safetensors") if told else ():
            sort_metadata(file)

    def networks(self) -> list[Any]:
        return [self.denoiser] if self.frozen is None else [self.denoiser, self.frozen]

    def blocks(self, network: Any) -> list[nn.Module]:
        return [module for module in network.modules() if type(module).__name__ in network._no_split_modules]

    def save(self, directory: Path) -> None:
        """Writes the trained weights as they are, in the form that stock diffusers loads."""
        self.write(directory, self.state())

    def load(self, path: Path) -> None:
        """Reads what `write` wrote, or any other LoRA that stock diffusers loads; path: the directory, or the file.

        Raises UserError if there is nothing of the kind, or it does not fit this model.
        """
        directory = path.parent if path.name.startswith("diffusion_pytorch_model") else path
        file = lora_file(directory)
        if file is not None:
            read = read_lora(file, self.pipeline, self.denoiser.config)
            if not all(name.startswith(f"{self.component}.") for name in read.state):
                self.open_encoders()
            lora.attach(self._adaptable(), read)
            self.gate = gate_of(file)
            self._encoders_now = (self._encoders_now[0] + 1, 1.0, True)
        elif (directory / "config.json").is_file():
            weights = _denoiser_weights(directory)
            if any(map(is_quantised, self.denoiser.parameters())):
                raise UserError(
                    f"{directory} is a fully fine-tuned denoiser, which cannot be put into quantised weights; set "
                    "model.quantize=null"
                )
            index = directory / DENOISER_INDEX  # of several files, whose headers do not say it
            self.gate = gate_of(index if index.is_file() else sorted(directory.glob("*.safetensors"))[0])
            self.frozen = self.frozen or copy.deepcopy(self.denoiser)
            self.denoiser.to(torch.promote_types(torch.float32, self.denoiser.dtype))  # tuned weights are not rounded
            try:
                self.denoiser.load_state_dict(weights)
            except RuntimeError as error:
                raise UserError(
                    f"{directory}: the denoiser does not fit this model: {first_line(error)[:200]}"
                ) from None
        else:
            raise UserError(
                f"{path} is neither a LoRA file nor a directory with one or with a denoiser; "
                "give the adapter/ directory of a run, or a LoRA file"
            )

    def set_scale(self, scale: float) -> None:
        if scale != 1 and self.frozen is not None:
            raise UserError(
                f"the LoRA scale is {scale}, but these weights are a fully fine-tuned denoiser, which has none; "
                "use annealing instead, such as the schedule linear"
            )
        for network in self._adaptable().values():
            lora.set_scale(network, scale)
        self._encoders_now = (self._encoders_now[0], scale, True)


def make_tuned(
    denoiser: Any, pipeline: Any, config: LoraConfig | None, seed: int, trainable: bool, attention: Sequence[str]
) -> Tuned:
    """Makes a loaded and frozen denoiser ready for training or, if not `trainable`, for sampling.

    pipeline: as in `Tuned`. config: of the adapters; None: the whole denoiser is trained, in at least float32.
    attention: the layers that its targets call "attention".
    """
    keep_small(denoiser)
    if trainable and config is not None:
        lora.add_lora(denoiser, config, seed, attention)
    elif trainable:
        denoiser.to(torch.promote_types(torch.float32, denoiser.dtype))
        frozen = copy.deepcopy(denoiser)  # in the trained precision, or the KL term would start at the rounding error
        denoiser.requires_grad_(True)
        return Tuned(denoiser, pipeline, frozen)
    return Tuned(denoiser, pipeline)


def gate_of(file: Path) -> float:
    """The gate that the weights of a file, or of the files of an index, were trained with; 0 without one.

    Raises UserError for a value that is none.
    """
    if file.name == DENOISER_INDEX:
        text = _index_metadata(file).get(GATE, "0")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(GATE, "0")
    else:
        return 0.0
    try:
        gate = float(text)
    except (TypeError, ValueError):
        gate = -1.0
    if not 0 <= gate < 1:
        raise UserError(f"{file}: {GATE} in its header is {text!r}; it must be a fraction from 0 up to 1")
    return gate


def _index_metadata(index: Path) -> Mapping[str, Any]:
    try:
        told = json.loads(index.read_text(encoding="utf-8"))["metadata"]
    except (ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def _denoiser_weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} contains no .safetensors weights")
    return {name: tensor for file in files for name, tensor in read_state_dict(file).items()}
