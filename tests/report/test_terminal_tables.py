"""Tables in a terminal."""

from __future__ import annotations

import pytest

from puma.cli.output import print_table


def test_names_are_not_read_as_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("strategy", "images"), [("[/red]\x1b[2J", "998")])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "[/red]\\x1b[2J 998" in lines


def test_wide_heads_leave_room_for_the_first_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    heads = ("strategy", "images", "mean eps (Linf, in 1/255)", "clean, %", "under CE + CW PGD, %", "robust, %")
    row = ("uniform-eps scale=0.5", "10,000", "4.25", "82.1 ±1.5", "61.8 ±2.2", "60.2 ±4.0")
    print_table(heads, [row])
    lines = capsys.readouterr().out.splitlines()
    assert any(" ".join(line.split()) == " ".join(row) for line in lines), lines
    assert max(map(len, lines)) <= 80
