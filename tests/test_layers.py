"""Files import from lower layers, or without cycles within their own package; read from the syntax, nothing is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from layers import BELOW_ALL, LAYERS, MODULES, ROOT, SRC, files, imports, inside, layer, module_of, unit

SAME_LAYER = {0, 8}  # files of one vocabulary, and surfaces, may build on one another; without cycles

FORBIDDEN = {"torchvision", "lpips"}
LIGHT = {  # what the vocabulary may need beside torch
    "config": {"omegaconf"}, "errors": set(), "garbage": set(), "progress": {"rich"},
    "weights": {"torch", "safetensors"},
}  # fmt: skip

LONGEST = 300  # lines of a file; one that is longer wants to be two


def test_every_file_has_a_layer() -> None:
    units = {unit(module_of(path)) for path in files()} - BELOW_ALL
    assert units <= set().union(*LAYERS), "name the layer of a new top-level file in docs/layers.py"
    assert {"types", "diffusion", "models"} <= units


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_downward(path: Path) -> None:
    own = unit(module_of(path))
    for target in imports(path):
        if not inside(target) or unit(target) == own or unit(target) in BELOW_ALL:
            continue
        if own in BELOW_ALL:
            continue  # the package's own lazy names
        here, there = layer(own), layer(unit(target))
        allowed = there < here or (there == here and here in SAME_LAYER)
        assert allowed, f"{path.relative_to(SRC)} imports {target}, of layer {there} from layer {here}"


def cycle(edges: dict[str, set[str]], start: str) -> list[str] | None:
    """A cycle through `start`, if there is one."""
    trail, seen = [(start, [start])], set()
    while trail:
        at, way = trail.pop()
        for target in edges[at]:
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                trail.append((target, [*way, target]))
    return None


def test_no_cycles() -> None:
    # a package's own __init__ may gather its files, which then must not import the package back
    edges = {
        name: {target for target in imports(path) if target in MODULES and target != name and target != "draftplus"}
        for name, path in MODULES.items()
    }
    for name in edges:
        found = cycle(edges, name)
        assert found is None, " -> ".join(found or [])


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_torchvision(path: Path) -> None:
    assert not FORBIDDEN & {target.split(".")[0] for target in imports(path)}


def test_the_mathematics_needs_torch_alone() -> None:
    outside = {
        target.split(".")[0]
        for path in (ROOT / "diffusion").glob("*.py")
        for target in imports(path)
        if not inside(target)
    }
    assert outside <= {"torch", *sys.stdlib_module_names} and "torch" in outside
    ours = {unit(target) for path in (ROOT / "diffusion").glob("*.py") for target in imports(path) if inside(target)}
    assert ours <= {*LAYERS[0], "diffusion"}


def test_the_vocabulary_needs_little() -> None:
    for path in files():
        own = unit(module_of(path))
        if own in LAYERS[0]:
            outside = {target.split(".")[0] for target in imports(path) if not inside(target)}
            assert outside <= {*LIGHT.get(own, {"torch"}), *sys.stdlib_module_names}, path


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_check_sees_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to write an import is found, so that the tests above can fail."""
    file = ROOT / "models" / "imaginary.py"
    source = (
        "import torchvision.ops as o\n"
        "from draftplus.rewards import clip\n"
        "from .. import build\n"
        "from ..data.prompts import x\n"
        "from . import lora\n"
        "def f():\n    import lpips\n    from draftplus.training.train import y\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, **_: source)
    assert set(imports(file)) == {
        "torchvision.ops", "draftplus.rewards.clip", "draftplus.build", "draftplus.data.prompts",
        "draftplus.models.lora", "lpips", "draftplus.training.train",
    }  # fmt: skip
