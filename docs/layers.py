"""The layers of the code, and which file imports which; read from the syntax, nothing is run.

tests/test_layers.py holds the code to them, docs/make_architecture.py draws them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
ROOT = SRC / "draftplus"

# Top-level files and packages, by layer, the lowest first; within a layer as they are drawn, from left to right. Those
# of one layer never import one another, save in the first and the last.
LAYERS = [
    ["types", "errors", "rng", "garbage", "launcher", "distributed", "progress", "hub", "weights", "config"],
    ["diffusion"],
    ["data", "models", "rewards", "metrics"],
    ["build"],
    ["runs"],
    ["evaluation"],
    ["training"],
    ["planning"],
    ["__main__", "cli", "api", "publish", "sweeps", "report"],
]
BELOW_ALL = {"draftplus"}  # the package itself holds the version and lazy names; anyone may import it


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.relative_to(ROOT).parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file names in its imports, wherever they stand, those for type checkers alone too."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join(filter(None, [*above[: len(above) - node.level + 1], base]))
            for alias in node.names:
                # `from package import module` imports the module
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def unit(module: str) -> str:
    """The top-level file or package of ours that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def inside(module: str) -> bool:
    return module.split(".")[0] == "draftplus"
