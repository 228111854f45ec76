"""The notebook runs from top to bottom, and what is committed is what it gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "digits.ipynb"


def pictures(notebook: Any) -> list[int]:
    """How many pictures each cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]


def test_the_notebook_runs_and_gives_the_pictures_that_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 300_000
    assert sum(pictures(committed)) == 5
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of the kernel, another process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.update(outputs=[], execution_count=None)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(notebook) == pictures(committed)
    texts = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "everything at full eps: clean 9" in texts
    assert "puma: clean 9" in texts
    assert list(tmp_path.iterdir()) == []
