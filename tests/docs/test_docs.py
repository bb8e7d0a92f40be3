"""The documentation agrees with the code and with itself."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from draftplus.config import all_keys
from draftplus.engine.build import REWARDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_configuration_page_is_current():
    source = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / unquote(name)).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in headings(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page):
    keys = {key for key, _ in all_keys()} | {"model.lora"}
    groups = {key.partition(".")[0] for key in keys if "." in key} - {"reward", "eval"}
    pattern = rf"`((?:{'|'.join(groups)})\.[a-z_.]+)(?:=[^`]*)?`"
    named = re.findall(pattern, page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in keys and not name.endswith(".py")] == []


def test_every_reward_is_described():
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in REWARDS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_diagrams_are_whole_and_alone(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"(?:href|src)=\"(?!#)|@import|url\((?!#)", text)


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
