"""What a terminal and a log file show of long work."""

from __future__ import annotations

import sys

import pytest

from puma import progress
from puma.errors import printable
from puma.progress import Progress


class Clock:
    """In place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setenv(progress.LOG_EVERY_ENV, "1")
    return clock


def test_a_line_says_the_rate_of_what_the_units_hold(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 20, "steps", show=True, done=10, each=(128, "images")) as bar:
        clock.now = 2.0
        bar.advance(1)
        clock.now = 4.0
        bar.advance(4, note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 11/20 steps 0.5/s, ETA 18 s, 64 images/s"  # what was done before is not counted
    assert lines[1] == "training: 15/20 steps 1.2/s, ETA 4 s, 160 images/s, loss 0.5"


def test_lines_of_other_processes_stand_behind_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("study a", 100, "%", show=True) as bar:
        clock.now = 2.0
        bar.update(40, "2 runs left", ["training: 1/2", "", "margins: 3/4"])
    assert "study a: 40/100 %, 2 runs left, training: 1/2 | margins: 3/4" in capsys.readouterr().err


@pytest.mark.parametrize("unit", ["steps", "%"])
def test_the_bar_of_a_terminal_shows_the_same_and_reads_no_markup(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("training [/red]\x1b]0;x", 20, unit, show=True, each=(128, "images")) as bar:
        clock.now = 0.5
        bar.update(1, "[/b]", ["line [/red]"])
    shown = capsys.readouterr().err
    for text in ("training [/red]\\x1b]0;x", f"1/20 {unit}", "256 images/s, [/b]", "line [/red]"):
        assert text in shown


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("quiet", 1) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_characters_that_command_a_terminal_become_visible() -> None:
    assert printable("katt \x1b[2J \u202e \x07 é 猫\n\tx") == "katt \\x1b[2J \\u202e \\x07 é 猫\n\tx"
