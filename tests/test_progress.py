"""Progress: a bar for a terminal; for a log file a line at each event and each minute, with the time that is left."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftplus import progress as progress_module
from draftplus.progress import APART, FIRST, QUIET, Lines, duration, progress
from tests.support.processes import Child, ranks


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(total: int | None, unit: str = "steps") -> tuple[Lines, Clock, list[str]]:
    clock, written = Clock(), list[str]()
    return Lines("training", total, unit, written.append, clock), clock, written


def test_a_line_a_minute_with_the_time_that_is_left() -> None:
    told, clock, written = lines(100)
    told.show(0, "")
    for step in range(1, 101):
        clock.now += 6
        told.show(step, f"reward {step}")
    told.end()
    assert written[0] == "training: 2 of 100 steps, reward 2, 9 min 48 s left"  # the first after FIRST = 10 s
    assert written[1:3] == [
        "training: 12 of 100 steps, reward 12, 8 min 48 s left", "training: 22 of 100 steps, reward 22, 7 min 48 s left"
    ]  # fmt: skip
    assert len(written) == 1 + 9 + 1 and written[-1] == "training: done in 10 min 0 s"


def test_a_line_comes_also_while_nobody_calls() -> None:
    """A step of five minutes, as a look each second sees it."""
    told, clock, written = lines(10)
    for _ in range(300):
        clock.now += 1
        told.look()
    assert written == [f"training: {minutes} min 0 s so far" for minutes in range(1, 6)]
    told.show(1, "reward 3")
    for _ in range(60):
        clock.now += 1
        told.look()
    assert written[-1] == "training: 1 of 10 steps, reward 3, 6 min 0 s so far"  # no speed is known yet


def test_an_event_has_a_line_of_its_own() -> None:
    told, clock, written = lines(10)
    told.show(0, "base model", event=True)
    assert written == []  # in the first two seconds
    clock.now += QUIET
    told.show(1, "held-out reward 3", event=True)
    clock.now += 1
    told.show(2, "reward 1")
    told.show(2, "held-out reward 4", event=True)
    assert [line.split(", ")[1] for line in written] == ["held-out reward 3", "held-out reward 4"]


def test_a_short_job_says_nothing() -> None:
    told, clock, written = lines(10)
    for step in range(11):
        told.show(step, "", event=True)
        clock.now += (QUIET - 0.01) / 11
    told.end()
    assert written == []


def test_a_continued_run_counts_its_own_steps_only() -> None:
    told, clock, written = lines(1000)
    told.show(900, "")  # restored
    clock.now += 50  # an evaluation, before the first step
    told.show(900, "")
    written.clear()
    for step in range(901, 911):
        clock.now += 10
        told.show(step, "")
    assert written[-1] == "training: 906 of 1000 steps, 15 min 40 s left"


def test_what_cannot_be_counted_is_told_by_its_time() -> None:
    told, clock, written = lines(None)
    for _ in range(int(APART) + 1):
        told.look()
        clock.now += 1
    assert written == ["training: 1 min 0 s so far"] and FIRST < APART


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for variable, value in (("TERM", "xterm"), ("COLUMNS", "160"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(variable, value)
    with progress("training", 4) as advance:
        advance(2, "reward 1.5, kl 3e-4")
    printed = capsys.readouterr()
    assert printed.out == ""
    for said in ("training", "2/4", "left", "reward 1.5", "kl 3e-4"):
        assert (said in printed.err) == terminal
    with progress("training", 4, show=False) as advance:
        advance.event(2, "")
    with progress("loading", None):
        pass
    assert "2/4" not in capsys.readouterr().err


def test_a_reader_that_has_gone_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        monkeypatch.setattr(progress_module, "QUIET", 0.0)
        before = threading.active_count()
        with progress("training", 4) as advance:
            assert threading.active_count() == before + 1
            advance.event(2, "reward 1.5")
        assert threading.active_count() == before
        with pytest.raises(BrokenPipeError):
            print("x", file=pipe)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # closing it flushes


def impatient(arguments: list[str]) -> None:
    """The command, with times that a test can wait for."""
    progress_module.QUIET, progress_module.FIRST, progress_module.APART = 0.0, 0.05, 0.1
    from draftplus.cli import main

    sys.argv = ["draftplus", *arguments]
    main()


def said(start: Callable[[], Child]) -> list[str]:
    child = start()
    assert child.wait() == 0, child.err.read_text()
    return child.err.read_text().splitlines()


@pytest.mark.slow
def test_a_log_file_of_every_command(settings: list[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> list[str]:
        return said(lambda: Child(impatient, [list(arguments)], tmp_path, {}))

    trained = run("train", *settings, "eval.every=2", "objective.kl_coeff=0.1", "train.steps=6")
    spoken = [line for line in trained if "held-out reward" in line]
    evaluated = list({line.split()[1]: line for line in spoken[::-1]}.values())[::-1]  # the first of each step
    number, time = r"-?[\d.]+(e[+-]\d+)?", r"[\d.]+ (s|min)( \d+ s)?"
    assert len(evaluated) == 4, trained  # steps 0, 2, 4 and 6
    for step, line in zip((2, 4), evaluated[1:3], strict=True):
        row = json.loads((tmp_path / "runs" / "run" / "eval.jsonl").read_text().splitlines()[step // 2])
        assert f"held-out reward {row['reward']:.4g}, LPIPS {row['lpips']:.4g}" in line
        told = rf"training: {step} of 6 steps, .*, reward {number}, kl {number}, {time} left"
        assert re.fullmatch(told, line), line
    assert trained[-1].startswith("training: done in ")
    made = run("generate", "runs/run", "--prompt", "a cat", "--seeds", "0:40", "train.sampling_batch_size=1")
    assert any(re.fullmatch(rf"generating: \d+ of 40 images, {time} left", line) for line in made), made
    measured = run("evaluate", "runs/run", "--images-per-prompt", "10", "train.sampling_batch_size=1", "-o", "measured")
    assert any(re.fullmatch(rf"evaluating: \d+ of 40 images, .*, {time} left", line) for line in measured), measured


@pytest.mark.slow
def test_one_rank_speaks(settings: list[str], tmp_path: Path) -> None:
    children = ranks(impatient, [["train", *settings, "eval.every=2"]], tmp_path, 2)
    assert [child.wait() for child in children] == [0, 0], children[0].err.read_text()
    assert "training: 2 of 4 steps" in children[0].err.read_text()
    assert "of 4 steps" not in children[1].err.read_text()


def test_time_as_people_say_it() -> None:
    assert duration(42) == "42.0 s" and duration(209) == "3 min 29 s" and duration(7260) == "2 h 1 min"
