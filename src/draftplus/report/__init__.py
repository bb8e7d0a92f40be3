"""Reports: the page of one run, and the comparison of several, each one self-contained HTML file."""

from draftplus.report.write import write_report

__all__ = ["write_report"]
