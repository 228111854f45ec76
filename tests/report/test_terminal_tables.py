"""Tables in a terminal."""

from __future__ import annotations

import pytest

from puma.cli.output import print_table


def test_names_are_not_read_as_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_table(("strategy", "images"), [("[/red]\x1b[2J", "998")], title="robust \x1b[2J")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "[/red]\\x1b[2J 998" in lines
    assert lines[0] == "robust \\x1b[2J"
