"""Loading the parts of a model from a diffusers directory, the hub, a single file, or replacement weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from draftplus.config import ModelConfig
from draftplus.errors import UserError, first_line, is_out_of_memory
from draftplus.hub import by_hand
from draftplus.models import files, fitting, quantize
from draftplus.models.bare import network
from draftplus.models.files import Stored
from draftplus.models.nemo import as_original
from draftplus.models.paths import directory_of
from draftplus.weights import read_state_dict

LDM_UNET = "model.diffusion_model."  # how the names of a denoiser's weights begin in the original layout
LDM_VAE = ("first_stage_model.", "vae.")  # those of an autoencoder, in a file of a whole model
REPLACED = {"unet": "denoiser", "transformer": "denoiser", "vae": "vae"}  # part -> the key of `model` that replaces it


@dataclass(frozen=True)
class Source:
    """Where the parts of a model are read from.

    directory: with their configurations, each in a folder, and their weights `stored`. state: the tensors of a single
    file in the original layout, which takes the place of the latter. config: says which parts are replaced. bare:
    networks are made without weights.
    """

    config: ModelConfig
    directory: Path
    stored: Mapping[str, Stored | None]
    state: dict[str, Tensor] | None = None
    bare: bool = False

    def replacement(self, name: str) -> str | None:
        """What the configuration gives instead of a part's weights."""
        return getattr(self.config, REPLACED[name]) if name in REPLACED else None

    def replaced(self, name: str) -> Path | None:
        """The file or directory that this is. Raises UserError for one that is not there, or cannot be tuned."""
        given = self.replacement(name)
        if given is None:
            return None
        path, where = Path(given).expanduser(), f"model.{REPLACED[name]} '{given}'"
        if not path.exists():
            raise UserError(f"{where}: no such file or directory")
        if path.suffix == ".gguf":
            raise UserError(f"{where}: quantised weights are not supported; give those it was made of, in .safetensors")
        return path

    def folder(self, name: str) -> Path:
        """Where a part's configuration is; a single file that replaces it has none of its own."""
        replaced = self.replaced(name)
        return replaced if replaced is not None and replaced.is_dir() else self.directory / name


def fetched(config: ModelConfig, path: str) -> Path:
    """The directory of a model: one on this disk, or the hub's cache with all of a hub id but its weights.

    Raises UserError for a model that is missing, and whatever the hub's library raises; `loading` makes one error of
    them.
    """
    path = directory_of(path)
    if config.config is not None:
        raise UserError(f"model.config is for single files, but model.path '{path}' is none; set model.config=null")
    return Path(path) if Path(path).is_dir() else files.fetch(path, config.revision, files.SMALL)


def source(
    config: ModelConfig, path: str, directory: Path, networks: Mapping[str, Any],
    accepts: Callable[[Mapping[str, Any]], None], bare: bool = False,
) -> Source:  # fmt: skip
    """A directory or hub id, its weights chosen by `model.variant`, fetched, and free of code; if `bare`, without any.

    directory: that was `fetched`. networks: the class of each folder with weights. accepts: called with the
    configurations of these, before any weights are fetched or read, to refuse what the family does not support.

    Raises UserError for a model that is not accepted, or weights that would run code, and whatever the libraries raise;
    `loading` makes one error of them.
    """
    where, local = f"model.path '{path}'", Path(directory_of(path)).is_dir()
    made = Source(config, directory, {}, bare=bare)
    accepts(configurations(networks, made))
    if bare:
        return made
    own = {name: cls for name, cls in networks.items() if made.replacement(name) is None}
    on_hub = {} if local else files.names_on_hub(path, directory)
    names = {name: files.names_in(directory / name) if local else on_hub.get(name, []) for name in own}
    forms = {name: files.forms(names[name], _of_diffusers(cls)) for name, cls in own.items()}
    files.refuse_unknown_variant(forms, config.variant, where)
    stored = {name: files.choose(forms[name], config.variant, f"{where}, {name}") for name in own}
    chosen = {name: one for name, one in stored.items() if one is not None}
    lacking = [name for name, one in stored.items() if one is None]
    if lacking and not local:
        raise FileNotFoundError(f"the hub or its cache has no weights of {', '.join(lacking)}")
    if not local:
        wanted = [file for name, one in chosen.items() for file in files.files_of(directory / name, one)]
        missing = [file.relative_to(directory).as_posix() for file in wanted if not file.is_file()]
        if missing:
            files.fetch(path, directory.name, missing)
    for name, one in chosen.items():
        files.check(directory / name, one)
    return Source(config, directory, stored)


def configurations(networks: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The settings of each part, with its class's defaults, as attributes; before any weights are read.

    Raises UserError for a replacement that is missing, FileNotFoundError where there are no settings, ValueError for a
    part of another class, and whatever the libraries raise.
    """
    found = {}
    for name, cls in networks.items():
        if source.folder(name) == source.directory / name:
            found[name] = _configuration(cls, source.directory / name, f"its {name}", f"{name}/config.json")
        else:
            with loading(f"model.{REPLACED[name]}", str(source.replacement(name))):
                found[name] = _configuration(cls, source.folder(name), "it", "config.json")
    return found


def _configuration(cls: Any, folder: Path, called: str, file: str) -> Any:
    if not (folder / "config.json").is_file():  # transformers takes the defaults then
        raise FileNotFoundError(f"it has no {file}")
    if not _of_diffusers(cls):
        return cls.config_class.from_pretrained(folder)
    given = cls.load_config(folder)
    if given.get("_class_name", cls.__name__) != cls.__name__:
        raise ValueError(f"{called} is a {given['_class_name']}, which is not supported, only {cls.__name__}")
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}
    return SimpleNamespace(**{**defaults, **given})


def load_part(cls: Any, source: Source, name: str, dtype: torch.dtype) -> Any:
    """A network of a pipeline; `name` is its folder.

    Raises UserError if replacement weights are missing or would run code, ValueError for weights that do not fit, and
    whatever the libraries raise; `loading` makes one error of them.
    """
    if source.bare:
        return network(cls, source.folder(name), dtype, name, source.config.quantize)
    replaced, told = source.replaced(name), quantize.arguments(source.config, name, _of_diffusers(cls), dtype)
    if replaced is not None:
        return _replacement(cls, source, name, dtype, replaced, told)
    if source.state is None:
        return _from_folder(cls, source.directory, name, dtype, source.stored[name], told)
    if not _of_diffusers(cls):
        return _text_encoder(cls, source.state, source.directory, name, dtype)
    return _from_tensors(cls, _only(name, source.state), source.directory, name, dtype, told)


def _replacement(
    cls: Any, source: Source, name: str, dtype: torch.dtype, given: Path, told: Mapping[str, Any]
) -> Any:  # fmt: skip
    key, replacement = f"model.{REPLACED[name]}", str(source.replacement(name))
    if given.is_dir():
        where = f"{key} '{replacement}'"
        stored = files.choose(files.forms(files.names_in(given), _of_diffusers(cls)), source.config.variant, where)
        if stored is not None:
            files.check(given, stored)
        with loading(key, replacement):
            return _from_folder(cls, given, "", dtype, stored, told)
    state = as_original(read_state_dict(given))
    with loading(key, replacement):
        return _from_tensors(cls, _only(name, state) or state, source.directory, name, dtype, told)


def _from_folder(
    cls: Any, directory: Path, name: str, dtype: torch.dtype, stored: Stored | None, told: Mapping[str, Any]
) -> Any:  # fmt: skip
    if stored is None:  # of which the libraries say more than an error
        raise FileNotFoundError(f"there are no weights in its folder {name}" if name else "there are no weights in it")
    given = {"torch_dtype" if _of_diffusers(cls) else "dtype": dtype, **stored.arguments, **told}
    part, info = cls.from_pretrained(
        directory, subfolder=name, output_loading_info=True, ignore_mismatched_sizes=True, **given
    )
    fitting.refuse_misfit(fitting.reported(info, _of_diffusers(cls)))
    return part


def _only(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a denoiser or an autoencoder in a file of a whole model."""
    prefixes = LDM_VAE if name == "vae" else (LDM_UNET,)
    return {key: tensor for key, tensor in state.items() if key.startswith(prefixes)}


def _from_tensors(
    cls: Any, state: dict[str, Tensor], directory: Path, name: str, dtype: torch.dtype, told: Mapping[str, Any]
) -> Any:  # fmt: skip
    with torch.device("meta"):
        like = cls.from_config(cls.load_config(directory, subfolder=name))
    state = _known_names(like, state)
    fitting.refuse_misfit(fitting.compared(like, state), fitting.taken_for(state))
    if told:  # which diffusers would pass over in silence for a UNet
        raise ValueError("it is a single file, and model.quantize needs a directory; or set model.quantize=null")
    if not fitting.reads_single_files(cls):
        part = cls.from_config(like.config).to(dtype)
        part.load_state_dict(state)
        return part.eval()
    # its converters empty what they are given, which another part may need
    given = {"config": str(directory), "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    return cls.from_single_file(dict(state), **given)


def _text_encoder(cls: Any, state: dict[str, Tensor], directory: Path, name: str, dtype: torch.dtype) -> Any:
    """Out of a file of a whole model, which may hold layers that are not used, as those of Stable Diffusion 2.x do."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    given = {"config": str(directory), "subfolder": name, "torch_dtype": dtype, "local_files_only": True}
    part = create_diffusers_clip_model_from_ldm(cls, state, **given)
    fitting.refuse_misfit(fitting.Misfit([key for key, p in part.named_parameters() if p.is_meta], (), ()))
    return part


def _known_names(like: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that diffusers' converters know: they miss some common spellings.

    like: the network.
    """
    if type(like).__name__ != "UNet2DConditionModel":  # whose converter wants what the others do without
        state = {key.removeprefix(LDM_UNET): tensor for key, tensor in state.items()}
    elif any(key.startswith("input_blocks.") for key in state):
        return {LDM_UNET + key: tensor for key, tensor in state.items()}
    if any(".resnets." in key for key in state):  # diffusers' own layout, whose attention had other names before 0.17
        state = like._fix_state_dict_keys_on_load(dict(state))
    return state


def _of_diffusers(cls: Any) -> bool:
    return bool(cls.__module__.startswith("diffusers."))


@contextmanager
def loading(key: str, value: str, family: str = "") -> Iterator[None]:
    """Turns whatever the libraries raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # those of four libraries have no base class in common
        if is_out_of_memory(error):
            raise
        hint = ""
        if isinstance(error, OSError) and not Path(value).expanduser().exists():
            hint = (
                " (a model that is not on this disk is read from the hub, which needs the network or an earlier "
                f"download: {by_hand(value)})"
            )
        wanted = f" as {family}" if family else ""
        said = first_line(error).partition(". If you want")[0]  # diffusers goes on with arguments that nobody can give
        raise UserError(f"{key} '{value}': cannot be loaded{wanted}: {said}{hint}") from error
