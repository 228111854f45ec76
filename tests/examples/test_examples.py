from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"

# What an extra brings, and a plain `pip install` does not.
ABSENT = ("datasets", "diffusers", "duckdb", "pandas", "polars", "ray", "tensorboard")

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
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError(f'No module named {__name__!r}')\n")
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS[script]:
        assert words in done.stdout


def normal(name: str) -> str:
    """The name of a distribution as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(place: Path) -> set[str]:
    """Top-level packages, beyond Python's own and ours, that a script or the snippets of a page import."""
    text = place.read_text()
    code = text if place.suffix == ".py" else "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert "puma" in names, place
    return names - sys.stdlib_module_names - {"puma"}


def test_only_core_dependencies_are_imported() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {normal(re.split(r"[<>=!~ \[;]", requirement)[0]) for requirement in needed}
    made_by = packages_distributions()
    for place in [ROOT / "README.md", *FOLDER.glob("*.py")]:
        assert {name for name in imported(place) if not core & set(map(normal, made_by.get(name, [])))} == set(), place
