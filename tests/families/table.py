"""The largest errors that the tests over families see, by family, as a table.

python -m tests.families.table              all of them, without a network; other arguments go to pytest
python -m tests.families.table -k sdxl
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Errors:
    """Collects what `below` was told."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, float]] = {}  # family -> what was looked at -> the largest error

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "error" and isinstance(value, (tuple, list)):
                name, what, error = value
                errors = self.seen.setdefault(name, {})
                errors[what] = max(errors.get(what, 0.0), error)

    def table(self) -> str:
        """Markdown, a row for each family."""
        columns = sorted({what for errors in self.seen.values() for what in errors})
        rows = [["model", *columns], ["---"] * (len(columns) + 1)]
        for name, errors in self.seen.items():
            rows.append([name, *(f"{errors[what]:.0e}" if what in errors else "–" for what in columns)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    errors = Errors()
    status = pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]], plugins=[errors])
    print(errors.table())
    sys.exit(status)
