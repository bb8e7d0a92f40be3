"""The documentation agrees with the code and with itself."""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from draftplus.build import METRICS, REWARDS
from draftplus.config import all_keys, load_config, recipe_names

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_current(generator):
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run: make docs"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_that_are_shown_load(page, tmp_path):
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(textwrap.dedent(block))
        load_config(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_parse(page):
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^ *(?:torchrun \S+ -m )?draftplus train (.*)$", text, re.MULTILINE):
        recipe, *settings = shlex.split(line, comments=True)
        if recipe in recipe_names():
            load_config(recipe, [setting for setting in settings if not setting.startswith("--")])


def test_every_reward_is_described():
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in REWARDS if f"`{name}`" not in text] == []


def test_every_metric_is_described():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_diagrams_are_whole_and_alone(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"(?:href|src)=\"(?!#)|@import|url\((?!#)", text)


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
