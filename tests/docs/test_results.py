"""docs/results.md says what the numbers in the repository give, which the study continues from."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.curves import Curve
from benchmarks.study.packing import opened
from benchmarks.study.plan import read_plan, tasks_of
from benchmarks.study.reading import Study, read_study
from benchmarks.study.tables import GAINS, Rival, against, coefficients, finals, lines, others_at, rivals

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "study" / "measured"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## The earlier study")[0]
INTERVAL = re.compile(r"[+−]\d+\.\d+ \([+−]\d[^()]* to [^()]*\)")


@pytest.fixture(scope="module")
def made() -> Study:
    with opened(MEASURED / "study.tar.xz") as directory:
        return read_study(read_plan("study"), directory)


def section(heading: str) -> str:
    """What stands below a heading of the page."""
    return re.split(r"\n#+ ", PAGE.split(f"# {heading}\n", 1)[1])[0]


def cells(text: str) -> list[list[str]]:
    """The rows of tables, with their heads."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("- ")]


def shortened(text: str) -> str:
    """A difference as the page has it."""
    text = re.sub(r"^– \(.*", "–", text)
    return text.replace("; in ", "; ").replace("% of draws", "%").removesuffix(" seeds")


def rival_of(made: Study, label: str) -> Rival:
    return next(one for one in rivals(made) if one.label == label)


def curve_of(made: Study, label: str) -> Curve:
    return next(one for one in [*made.curves.values(), *lines(made).values()] if one.label == label)


@pytest.mark.parametrize("rival", ["DRaFT-1, stopped early", "DRaFT+ (window), β = 10, 200 steps, stopped early"])
def test_differences_at_equal_gain_are_those_of_the_stored_numbers(made: Study, rival: str) -> None:
    (_, *gains), *rows = cells(section(f"Less {rival}"))
    assert gains == [f"gain {gain:g}" for gain in GAINS] and len(rows) > 15
    for label, *told in rows:
        curve = curve_of(made, label)
        assert told == [shortened(against(made, curve, rival_of(made, rival), gain).told()) for gain in GAINS], label


def test_intervals_over_seeds_or_animals_alone_are_those_of_the_stored_numbers(made: Study) -> None:
    _, *rows = cells(section("Where the uncertainty comes from"))
    assert len(rows) == 5
    for label, rival, *told in rows:
        for over, one in zip(("both", "seeds", "prompts"), told, strict=True):
            alone = replace(made, over=over)
            difference = against(alone, curve_of(made, label), rival_of(made, rival), 1.0).difference
            assert difference is not None and one == shortened(difference.told()), (label, rival, over)


def test_last_steps_and_coefficients_are_those_of_the_stored_numbers(made: Study) -> None:
    told = cells(section("What each part does"))
    printed = [*cells(coefficients(made)), *(row[:-1] for row in cells(finals(made)))]  # without seconds per step
    assert told == printed


def test_other_measures_are_those_of_the_stored_numbers(made: Study) -> None:
    _, *rows = cells(section("Other measures"))
    printed = {row[0]: [shortened(cell) for cell in row] for row in cells(others_at(made, 1.0))}
    assert len(rows) > 5
    for row in rows:
        assert row == printed[row[0]]


def test_prose_repeats_the_tables(made: Study) -> None:
    """Each interval that the text or the summary gives is in a table of the page, or is computed here."""
    candidate, knobs = curve_of(made, "KL before the window, 30, 200 steps"), (
        "DRaFT+ (window), over β: the best of all", "DRaFT-1, over its LoRA scale", "DRaFT-1, over its annealing"
    )  # fmt: skip
    computed = [against(made, candidate, rival_of(made, knob), 1.0).told() for knob in knobs]
    two = curve_of(made, "KL before the window, 30, two draws")
    computed.append(against(made, two, rival_of(made, "DRaFT-1, stopped early"), 1.0).told())
    tables = PAGE.split("\n## LPIPS at equal gain\n")[1]
    known = {one for row in cells(tables) for cell in row for one in INTERVAL.findall(cell)}
    known |= {INTERVAL.findall(shortened(one))[0] for one in computed}
    prose = "\n".join(line for line in tables.splitlines() if not line.startswith("|")) + section("Summary")
    told = [shortened(one) for one in INTERVAL.findall(prose.replace("\n", " "))]
    assert len(told) > 12
    assert not [one for one in told if one not in known]


def test_the_study_goes_on_from_what_is_stored() -> None:
    for name, seeds, finished, runs in (("study", 8, 111, 115), ("pilot", 3, 24, 24)):
        with opened(MEASURED / f"{name}.tar.xz") as directory:
            tasks = tasks_of(read_plan(name), directory, range(seeds), "cpu")
            assert sum(task.finished() for task in tasks) == finished
            assert len(list(directory.glob("*/seed-*"))) == runs
    left = 23 * 8 - 111
    assert (
        f"{115} runs of the study and {24} of the pilot" in PAGE
        and f"111 runs of today's plan and trains the other {left}" in PAGE
    )
