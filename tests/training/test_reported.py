"""The report of a run is written at every evaluation, and no fault of a page ends a training."""

from pathlib import Path
from typing import Any

import draftplus
from draftplus import api


def test_the_report_is_there_at_every_evaluation(settings: list[str], monkeypatch: Any, capsys: Any) -> None:
    pages, write = [], api.write_report

    def reported(run: Path) -> Path:
        path = write(run)
        pages.append(path.read_text(encoding="utf-8"))
        if len(pages) == 2:
            raise ZeroDivisionError("of a page")
        return path

    monkeypatch.setattr(api, "write_report", reported)
    run = draftplus.train(settings[0], ["eval.every=2"])
    assert len(pages) == 4  # at steps 0, 2 and 4, and at the end
    for step, page in zip((0, 2, 4), pages, strict=False):
        assert f"Running, step {step} of 4" in page
    assert "Running" not in pages[-1] and "4 steps" in pages[-1] and (run / "report.html").read_text() == pages[-1]
    assert "report.html is not written: of a page; the training goes on" in capsys.readouterr().err
