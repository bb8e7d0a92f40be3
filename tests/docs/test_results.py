"""docs/results.md says what the numbers in the repository give."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.packing import opened
from benchmarks.study.plan import read_plan
from benchmarks.study.reading import Study, read_study
from benchmarks.study.tables import beside_early, coefficients, equal_gain, finals, others_at, over_training, rivals, summary

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "study" / "measured"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
STUDY = PAGE.split("\n## The earlier study")[0]
INTERVAL = re.compile(r"[+−]?\d+\.\d+ \([^()]* to [^()]*\)")


@pytest.fixture(scope="module")
def made() -> Study:
    with opened(MEASURED / "study.tar.xz") as directory:
        return read_study(read_plan("study"), directory)


def section(page: str, heading: str) -> str:
    """What stands below a heading."""
    return re.split(r"\n#+ ", page.split(f" {heading}\n", 1)[1])[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {i for i, line in enumerate(lines) if set(line) <= set("|- ")}
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for i, line in enumerate(lines)
        if i not in heads and i + 1 not in heads
    ]
