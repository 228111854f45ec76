from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"

# What each script has to say at its end; figures are left to the engines' own tests.
SAYS = {
    "whole_way.py": ["kept 629 of 898 images", "robust"],
    "own_training_loop.py": ["trained on 629 of 898 images"],
    "own_model.py": ["puma-plus keeps 629 images"],
    "own_dataset.py": ["2695 of 3594 images"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("script", SAYS)
def test_example_runs(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS[script]:
        assert words in done.stdout
