"""Code that a file names is not run for the file's sake: a user says so once, and is not asked about their own.

Code is named by `package.module:object`. What a user types is theirs to decide. What a recipe, a sweep file or a run's
config.yaml names is refused, before anything of it is imported, unless `--trust` is given or it was trusted before.
That is remembered in the user's state directory, by the file that names the code, with a hash of the name, its settings
and its source; so other code in the same place is refused again. A run of one's own is known by its content too, so
that it may be moved.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import machinery, util
from pathlib import Path
from typing import Any

from draftplus.config.schema import Config, RewardConfig
from draftplus.errors import UserError, notice

Layer = Mapping[str, Any]
Named = dict[str, tuple[str, RewardConfig]]  # reference -> the key that names it, and its settings

_GIVEN: ContextVar[bool] = ContextVar("trust", default=False)

_NEW = "runs only if you trust it.\nLook at it first, then repeat the command with --trust (in Python: trust=True)"
_CHANGED = (
    "has changed since you trusted it or trained with it.\nRestore it, or look at it and repeat the command with "
    "--trust (in Python: trust=True); but a training goes on only with the code that it began with"
)


@contextmanager
def trusting(given: bool) -> Iterator[None]:
    """Inside, where `given`, code that files name is trusted, and remembered as such."""
    token = _GIVEN.set(given or _GIVEN.get())
    try:
        yield
    finally:
        _GIVEN.reset(token)


def refuse_library(reference: str, where: str = "") -> None:
    """UserError for what belongs to Python itself, in which no function is a reward and many do harm."""
    top = reference.partition(":")[0].partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(
            f"{where}reward '{reference}': {top} is a module of Python itself, and nothing in it is a reward"
        )


def refuse_untrusted(
    config: Config, files: Sequence[tuple[Path, Layer]], typed: Layer, only: Collection[str] | None = None,
    filed: Callable[[], Config] | None = None,
) -> None:  # fmt: skip
    """UserError for code in a configuration that a file names, and its user neither typed nor trusted.

    files: what each file says, the one that counts most last. typed: what the user's own KEY=VALUE say, together. only:
    the references that are about to be run; None: all. filed: the configuration without what is typed, where there is.
    """
    if not files:
        return
    own, whose = _named(typed), {name: path for path, layer in files for name in _named(layer)}
    for reference, (key, settings) in named_by(config).items():
        if only is not None and reference not in only:
            continue
        file = whose.get(reference, files[-1][0])  # what no layer names in so many words is the last file's
        refuse_library(reference, f"{file}: " if reference not in own else "")
        alone = own.get(reference) == {"path": settings.path, "args": settings.args}
        if alone or (reference in own and reference not in whose):
            continue
        known, code = _trusted(file).get(reference, set()), digest(reference, settings)
        theirs = named_by(filed()).get(reference) if known and filed and reference in own else None
        if code not in known and (theirs is None or digest(reference, theirs[1]) not in known):
            if not _GIVEN.get():
                raise UserError(f"{file}: {key} names the code {reference}, which {_CHANGED if known else _NEW}")
            _remember(file, {reference: code})
        _forget_bytecode(reference)


def remember(file: Path, config: Config) -> None:
    """Trusts the code of a configuration that this user wrote to a file: a run of their own."""
    code = {reference: digest(reference, settings) for reference, (_, settings) in named_by(config).items()}
    for known_by in (_by_place, _by_content) if code else ():
        _remember(file, code, known_by)


def named_by(config: Config) -> Named:
    """The code that a configuration names."""
    sections = (("reward", config.reward), ("eval.rewards", config.eval.rewards))
    return {name: (key, one) for key, section in sections for name, one in section.items() if ":" in name}


def _named(layer: Layer) -> dict[str, dict[str, Any]]:
    """The code that a layer of a configuration names, with the path and the arguments that it gives."""
    measured = layer.get("eval")
    sections = (layer.get("reward"), measured.get("rewards") if isinstance(measured, Mapping) else None)
    return {
        name: {"path": given.get("path"), "args": given.get("args") or {}}
        for section in sections
        if isinstance(section, Mapping)
        for name, one in section.items()
        if ":" in name and isinstance(given := one or {}, Mapping)
    }


def digest(reference: str, settings: RewardConfig) -> str:
    """The SHA-256 of a name, of its settings but the weight, and of its source."""
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in _sources(reference)}
    told = [reference, settings.path, settings.args, files]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _sources(reference: str) -> list[tuple[str, Path]]:
    return sources(reference.partition(":")[0], list(_places()))


def sources(module: str, places: Sequence[Path], only: str = "") -> list[tuple[str, Path]]:
    """The files of a module and of all that it imports from these directories, named. Nothing is imported.

    only: the one top-level package that is followed; none: all but this one.
    """
    found: dict[str, list[Path]] = {}
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in found and (parts[0] == only if only else parts[0] != "draftplus"):
                found[name] = _files_of(name, places)
                waiting += [imported for path in found[name] for imported in _imports(name, path)]
    return [(f"{name} {path.name}", path) for name, paths in sorted(found.items()) for path in paths]


def _files_of(module: str, places: Sequence[Path]) -> list[Path]:
    # all that could be meant in one directory: Python takes an extension before a source file
    for place in places:
        stem = place.joinpath(*module.split("."))
        candidates = [stem / f"__init__{suffix}" for suffix in machinery.all_suffixes()]
        candidates += [stem.with_name(stem.name + suffix) for suffix in machinery.all_suffixes()]
        files = [path for path in candidates if path.is_file()]
        if files:
            return files
    return []


def _places() -> Iterator[Path]:
    installed = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    yield Path.cwd()
    for entry in map(Path, sys.path):
        if entry.is_dir() and not any(entry.is_relative_to(one) for one in installed):
            yield entry


def _imports(module: str, path: Path) -> Iterator[str]:
    """The modules that a source file names in its imports, wherever they stand."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes()))) if path.suffix == ".py" else []
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # its import will say so, where there is one
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            yield from filter(None, [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)])


def _forget_bytecode(reference: str) -> None:
    # Python believes a cached file wherever size and time of its source fit, and a stranger can make them fit
    for _, path in _sources(reference):
        if path.suffix == ".py":
            with suppress(OSError):
                Path(util.cache_from_source(str(path))).unlink(missing_ok=True)


def _by_place(file: Path) -> bytes:
    return str(file.resolve()).encode()


def _by_content(file: Path) -> bytes:
    return b"content\0" + file.read_bytes()


def _record(what: bytes) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "draftplus" / "trusted" / f"{hashlib.sha256(what).hexdigest()}.json"


def _trusted(file: Path) -> dict[str, set[str]]:
    """The code that is trusted where a file names it: reference -> hashes."""
    found: dict[str, set[str]] = {}
    for known_by in (_by_place, _by_content):
        for reference, code in _noted(file, known_by).items():
            found.setdefault(reference, set()).add(code)
    return found


def _noted(file: Path, known_by: Callable[[Path], bytes]) -> dict[str, str]:
    try:
        told = json.loads(_record(known_by(file)).read_text(encoding="utf-8"))
        return {str(reference): str(code) for reference, code in told["code"].items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: ask again
        return {}


def _remember(file: Path, code: Mapping[str, str], known_by: Callable[[Path], bytes] = _by_place) -> None:
    told = {"file": str(file.resolve()), "code": {**_noted(file, known_by), **code}}
    try:
        target = _record(known_by(file))
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = target.with_name(f".{target.name}.{os.getpid()}")
        with open(os.open(building, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as opened:
            json.dump(told, opened, indent=1)
        building.replace(target)
    except (OSError, RuntimeError) as error:  # a home that cannot be written, or none
        notice(f"that you trust {file} cannot be remembered ({error}), so you will be asked again")
