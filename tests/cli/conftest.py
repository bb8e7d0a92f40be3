from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from draftplus import cli


@dataclass(frozen=True)
class Printed:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture
def draftplus(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., Printed]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Printed:
        monkeypatch.setattr("sys.argv", ["draftplus", *map(str, arguments)])
        for seconds in ("QUIET", "FIRST", "APART"):  # a slow machine would add lines of its own
            monkeypatch.setattr(f"draftplus.progress.{seconds}", 3600.0)
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        said = capsys.readouterr()
        return Printed(code, said.out, said.err)

    return run


@pytest.fixture
def refused(draftplus: Callable[..., Printed]) -> Callable[..., None]:
    """Runs a command that must be refused as a user's mistake, in words that match each pattern."""

    def run(arguments: list[Any], *patterns: str) -> None:
        printed = draftplus(*arguments)
        assert printed.code == 2, printed
        assert printed.out == ""
        assert 1 <= len(printed.err.splitlines()) <= 2, printed.err
        assert printed.err.startswith("draftplus: ")
        assert "Traceback" not in printed.err
        assert not re.search("[\u2500-\u257f]", printed.err), "a box"
        for pattern in patterns:
            assert re.search(pattern, printed.err), f"{pattern} in {printed.err}"

    return run
