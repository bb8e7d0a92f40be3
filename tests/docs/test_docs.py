"""The documentation agrees with the code and with itself."""

import inspect
import itertools
import re
import shlex
import textwrap
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import make_architecture
import make_configuration
import pytest
import typer

from draftplus.build import METRICS, build_metric
from draftplus.cli import CommandLineError, app
from draftplus.cli.reward.train import train as train_reward
from draftplus.cli.shared import read_seeds
from draftplus.config import COMMANDS, all_keys, load_config, load_reward_config, recipe_names, trusting
from draftplus.errors import UserError
from draftplus.rewards.names import REWARDS, is_reward, refuse_unknown_reward
from draftplus.sweeps.grid import expand, parse_grid, with_variants

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_configuration_page_is_current():
    assert make_configuration.PAGE.read_text(encoding="utf-8") == make_configuration.page(), "run: make docs"


def test_drawing_of_the_packages_is_current():
    assert make_architecture.PICTURE.read_text(encoding="utf-8") == make_architecture.picture(), "run: make docs"


def test_drawing_of_the_packages_is_legible():
    """Boxes stand apart with room for their text, and arrows meet only the two boxes that they join."""
    edges = make_architecture.reduced(make_architecture.package_imports())
    boxes = make_architecture.placed(edges)
    corners = {name: ((box.left, box.top), (box.right, box.bottom)) for name, box in boxes.items()}
    for box in boxes.values():
        letters = max(map(len, [make_architecture.shown(box.name), *box.lines]))
        assert letters * make_architecture.FILE < box.right - box.left - 10, box.name
    for one, other in itertools.combinations(boxes, 2):
        assert not make_architecture.meet(corners[one], corners[other], 10), (one, other)
    arrows = make_architecture.routed(edges, boxes)
    assert set(arrows) == {(source, target) for source in edges for target in edges[source]}
    for pair, points in arrows.items():
        for line in itertools.pairwise(points):
            met = {name for name in boxes if make_architecture.meet(line, corners[name], 5)}
            assert met <= set(pair), f"the arrow {pair} crosses {met - set(pair)}: reorder a row of docs/layers.py"


def test_reduction_leaves_out_what_a_longer_path_says():
    edges = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"b", "d"}}
    assert make_architecture.reduced(edges) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"b"}}


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
    keys = {key for schema in COMMANDS for key, _ in all_keys(schema)} | {"model.lora"}
    groups = {key.partition(".")[0] for key in keys if "." in key} - {"reward", "eval"}
    pattern = rf"`((?:{'|'.join(groups)})\.[a-z_.]+)(?:=[^`]*)?`"
    named = re.findall(pattern, page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in keys and not name.endswith(".py")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_that_are_shown_load(page, tmp_path):
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(textwrap.dedent(block))
        with trusting(True):
            load_config(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_parse(page):
    for line in commands_shown(page.read_text(encoding="utf-8")):
        try:
            check_command(line)
        except (UserError, CommandLineError) as error:
            pytest.fail(f"{page.name}: {line}: {getattr(error, 'message', error)}")


def test_every_command_is_shown_and_read():
    """The reader of code blocks finds the commands in them, also those behind a prompt, torchrun or a broken line."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = {shlex.split(line)[0] for line in commands_shown(text)}
    groups = {group.name for group in app.registered_groups}
    assert shown == {command.callback.__name__ for command in app.registered_commands} | groups
    block = """
    ```console
    $ draftplus generate emoji --prompt "a cat"
    draftplus in the output, after a prompt
    ```
    ```bash
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m draftplus train emoji \\
        optim.lr=3e-4   # slowly
    ```
    draftplus nothing outside of a block
    """
    assert commands_shown(block) == ['generate emoji --prompt "a cat"', "train emoji optim.lr=3e-4   # slowly"]


@pytest.mark.parametrize(
    "line",
    [
        "trian demo",
        "train demo --dryrun",
        "train demo optim.lrr=1e-3",
        "train demo optim.lr=fast",
        "train optim.lrr=1e-3",
        "train runs/demo train.stepss=120",
        "generate emoji --promt 'a cat'",
        "generate emoji --prompt 'a cat' sampler.step=25",
        "generate emoji --prompt 'a cat' --seeds 0-8",
        "generate emoji --prompt 'a cat' --reward emoji_clap",
        "evaluate runs/demo --images-per-promt 50",
        "evaluate runs/demo --metric lpip",
        "evaluate runs/demo sampler.step=25",
        "sweep emoji objective.kl_coef=0,1",
        "sweep emoji objective.kl_coeff=0,1,",
        "sweep emoji seed=0,1 --job 2",
        "report runs/demo --out page.html",
        "report",
    ],
)
def test_a_misspelt_command_is_found(line):
    with pytest.raises((UserError, CommandLineError)):
        check_command(line)


def commands_shown(text: str) -> list[str]:
    """What follows `draftplus` in the command lines of a page's code blocks; output under a `$` prompt is left out."""
    lines = []
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r"\\\n\s*", "", block)
        prompt = r"\$ " if language == "console" else ""
        lines += re.findall(rf"^ *{prompt}(?:\w+=\S* )*(?:torchrun .*-m )?draftplus (.*)$", block, re.MULTILINE)
    return lines


def check_command(line: str) -> None:
    """Parses a command line as the command would, without running it. line: what follows `draftplus`.

    Raises UserError or CommandLineError for an unknown command, option, key, reward or metric, and for values that the
    command or the configuration would refuse. Settings of a run or of a file are checked over the default recipe.
    """
    root = typer.main.get_command(app)
    name, command, arguments = root.resolve_command(root.context_class(root), shlex.split(line, comments=True))
    if isinstance(command, type(root)) and arguments:  # a command of `draftplus reward`
        name, command, arguments = command.resolve_command(command.context_class(command), arguments)
    given = command.make_context(name, arguments).params
    if inspect.unwrap(command.callback) is train_reward:
        settings = [text for text in (given["target"], *(given["settings"] or [])) if text and "=" in text]
        load_reward_config(None, settings)
        return
    recipe = given.get("recipe", given.get("target"))
    recipe = recipe if recipe in recipe_names() else "emoji"
    texts = [given.get("target"), *(given.get("settings") or []), *given.get("arguments", [])]
    settings = [text for text in texts if text and "=" in text]
    if given.get("grid"):
        for run in expand(with_variants(parse_grid(given["grid"]))):
            load_config(recipe, [f"{key}={value}" for key, value in run.items()])
    load_config(recipe, settings)
    if given.get("seeds"):
        read_seeds(given["seeds"])
    for reward in given.get("reward") or []:
        refuse_unknown_reward(reward)
    for metric in given.get("metric") or []:
        if not is_reward(metric):
            build_metric(metric)


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
