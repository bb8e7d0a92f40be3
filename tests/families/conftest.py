"""The tiny pipelines, each saved once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.families.cases import CASES, Case
from tests.support.pipelines import save_pipeline

Saved = Callable[[str], Path]
Below = Callable[[str, Any, float], None]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A tiny pipeline's directory by its name; read only."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_pipeline(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return directory


@pytest.fixture(params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    """Each family's."""
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture
def directory(name: str, saved: Saved) -> Path:
    """That of a family's tiny pipeline; read only."""
    return saved(name)


@pytest.fixture
def below(name: str, record_property: Callable[[str, object], None]) -> Below:
    """Asserts that an error is below a bound, and keeps it, by what was looked at, for `tests/families/table.py`."""

    def check(what: str, error: Any, bound: float) -> None:
        record_property("error", (name, what, float(error)))
        assert error < bound

    return check
