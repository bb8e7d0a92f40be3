"""The files that shape a run, by their content: prompts, model, and the rewards' weights and code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from draftplus.build import REWARDS, reward_loader
from draftplus.config import AnyConfig, Config, ModelConfig, RewardConfig, RewardTrainConfig, file_keys
from draftplus.config.trust import sources
from draftplus.data.pairs import Pairs
from draftplus.data.places import contents_hash
from draftplus.distributed import World
from draftplus.errors import UserError
from draftplus.models.families import model_path
from draftplus.models.files import loaded_from
from draftplus.models.loading import REPLACED
from draftplus.models.paths import PACKAGED
from draftplus.models.stock import ABSENT, index_of
from draftplus.progress import progress
from draftplus.rewards.arguments import parameters_of
from draftplus.runs.checksums import files_hash, named_hash, text_hash, texts_hash
from draftplus.runs.directory import saved_steps
from draftplus.runs.origin import ORIGIN, REWARD_MODELS, read_origin

PARTS = re.compile(r"(unet|transformer|vae|text_encoder|tokenizer|scheduler)(_\d)?")  # the folders of a model
PICTURES = ", its pictures"  # behind a key of pairs
CONFIGS = (".json", ".txt", ".model", ".jinja")


def source_hash(path: str, revision: str | None, index: str = "model_index.json") -> str:
    """The SHA-256 of a file or directory; of a hub model its id and the commit that is in the cache."""
    local = Path(path).expanduser()
    if local.exists():
        return files_hash(local)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, index, revision=revision)
    except HFValidationError:  # such as an address that a reward of the user's own reads
        return path
    commit = Path(found).parent.name if isinstance(found, str) else revision or "main"
    return f"{path}@{commit}"


def same_inputs(config: Config, run: Path, prompts: Sequence[str], here: World) -> Mapping[str, str]:
    """The hashes of what shapes a run, by key; every process calls it. prompts: those to train on.

    Raises UserError where the run is continued, and one of them is not what it was.
    """

    def hashes() -> dict[str, str]:
        now = {"data.prompts": texts_hash(prompts), **model_hashes(config.model)}
        for name, reward in config.reward.items():
            now |= _reward(name, reward)
        return now

    return _agreed(config, run, hashes, here)


def same_reward_inputs(
    config: RewardTrainConfig, run: Path, pairs: Pairs, validation: Pairs, here: World
) -> Mapping[str, str]:
    """`same_inputs` of a run that trains a reward. Of pictures, sizes and some bytes are looked at, `contents_hash`."""

    def hashes() -> dict[str, str]:
        now = dict[str, str]()
        given = {"data.pairs": pairs} | ({"data.validation": validation} if config.data.validation is not None else {})
        for key, some in given.items():
            places = some.places()
            with progress("looking at pictures", None) as advance:
                now |= {key: text_hash([row.told for row in some]), key + PICTURES: contents_hash(places, advance)}
        for key, path in (("model.path", config.model.path), ("model.processor", config.model.processor)):
            if path not in (None, *REWARD_MODELS):
                now[key] = source_hash(str(path), config.model.revision, "config.json")
        return now

    return _agreed(config, run, hashes, here)


def _agreed(config: AnyConfig, run: Path, hashes: Callable[[], dict[str, str]], here: World) -> Mapping[str, str]:
    told = here.gather(_looked_at(config, run, hashes) if here.is_main else None)[0]
    if isinstance(told, UserError):
        raise told
    assert isinstance(told, dict)
    return told


def _looked_at(config: AnyConfig, run: Path, hashes: Callable[[], dict[str, str]]) -> dict[str, str] | UserError:
    now = hashes()
    before = read_origin(run) if saved_steps(run / "checkpoints") else None
    files = file_keys(config)
    for key in sorted(now.keys() | before.inputs.keys()) if before else ():
        assert before is not None
        # what only one of two versions of draftplus looks at is no change; a file that was none before is
        if now.get(key) != before.inputs.get(key) and (key in files or (key in now and key in before.inputs)):
            since = f"at step {before.step}" if before.step else "when it was started"
            what = f"a picture of {key.removesuffix(PICTURES)}" if key.endswith(PICTURES) else key
            return UserError(
                f"{run}: {what} has another content than {since}; restore it, or choose another name= for a new run. "
                f"To continue with what is there now, remove {run / ORIGIN}"
            )
    return now


def model_hashes(config: ModelConfig) -> dict[str, str]:
    """The SHA-256 of the files that are loaded of a base model, by key; of a hub model its id and commit.

    Raises UserError for a built-in name that does not exist, and weights of which it is not clear which are meant.
    """
    path = Path(model_path(config)).expanduser()
    if path.is_dir():
        files = {"model_index.json": path / "model_index.json"}
        absent = {name for name, told in index_of(path).items() if told == ABSENT}
        folders = (one for one in path.iterdir() if one.is_dir() and PARTS.fullmatch(one.name))
        for part in sorted(one for one in folders if one.name not in absent):
            replaced = part.name in REPLACED and getattr(config, REPLACED[part.name]) is not None
            loaded = _configurations(part) + ([] if replaced else _weights(part, part.name, config.variant))
            files |= {f"{part.name}/{file.name}": file for file in loaded}
        hashes = {"model.path": named_hash(files)}
    else:
        hashes = {"model.path": source_hash(str(path), config.revision)}
    for key in ("denoiser", "vae"):
        if getattr(config, key) is not None:
            given = Path(getattr(config, key)).expanduser()
            inside = _configurations(given) + _weights(given, key, config.variant) if given.is_dir() else []
            files = {"": given} if given.is_file() else {file.name: file for file in inside}
            hashes[f"model.{key}"] = named_hash(files)
    if config.config is not None:
        given = Path(config.config).expanduser()
        packaged = config.config in PACKAGED or not given.is_dir()
        files = {} if packaged else {str(file.relative_to(given)): file for file in given.rglob("*.json")}
        hashes["model.config"] = config.config if packaged else named_hash(files)
    return hashes


def _configurations(part: Path) -> list[Path]:
    inside = [path for path in part.iterdir() if path.is_file() and not path.name.startswith(".")]
    return [path for path in inside if path.suffix in CONFIGS and not path.name.endswith(".index.json")]


def _weights(part: Path, name: str, variant: str | None) -> list[Path]:
    return loaded_from(part, not name.startswith("text_encoder"), variant)  # transformers loads these


def _reward(name: str, config: RewardConfig) -> dict[str, str]:
    loader = reward_loader(name)
    default = next((p.default for p in parameters_of(name, loader) if p.name == "path"), None)
    hashes = {}
    path = config.path or (default if isinstance(default, (str, Path)) else None)
    if path is not None:
        hashes[f"reward.{name}.path"] = source_hash(str(path), config.args.get("revision"), "config.json")
    for key, value in config.args.items():
        named = _named(value) if isinstance(value, str) else None
        if named is not None:
            hashes[f"reward.{name}.args.{key}"] = files_hash(named)
    if name not in REWARDS:
        hashes[f"reward.{name}"] = named_hash(code_of(name.partition(":")[0]))
    return hashes


def _named(text: str) -> Path | None:
    """The file or directory that a text names; None for any other text, and for "." or "/", which hold everything."""
    try:
        path = Path(text).expanduser()
        whole = not Path.cwd().is_relative_to(path.resolve())
        return path if whole and (path.is_file() or path.is_dir()) else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, ~ of nobody, a zero in it
        return None


def code_of(module: str) -> dict[str, Path]:
    """The files of an imported module, and of those that it imports from beside it, by the names of both."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return {}
    above = module.count(".") + (Path(file).name == "__init__.py")
    root = Path(file).resolve().parents[above]
    installed = {"site-packages", "dist-packages"} & set(root.parts)
    return dict(sources(module, [root], only=module.partition(".")[0] if installed else ""))
