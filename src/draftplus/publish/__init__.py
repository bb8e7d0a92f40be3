"""A run's result for other programs, with a page that tells what it is: `draftplus export`."""

from draftplus.publish.write import FORMATS, export_run

__all__ = ["FORMATS", "export_run"]
