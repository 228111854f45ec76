"""The picture of costs in toy sizes: every kind of point that needs no real images, stored once and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth.py"


def test_every_point_is_measured_once_and_drawn(tmp_path: Path) -> None:
    stored, picture = tmp_path / "growth.json", tmp_path / "growth.svg"
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(stored), "--picture", str(picture)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = json.loads(stored.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"scoring_linear", "scoring_part", "planning", "sampling", "training"}
    assert all(row.get("seconds", row.get("part_seconds")) > 0 and row["peak"] >= row["base"] > 0 for row in rows)
    assert len(first.stdout.splitlines()) == len(rows)
    assert "small-cnn" in picture.read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert again.stdout == ""
    assert json.loads(stored.read_text())["rows"] == rows
