"""Imports only point down (DESIGN: the house), read from the source of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "puma"

# From the ground up. A module may import modules of lower layers and of its own room, nothing else.
LAYERS: list[set[str]] = [
    {"errors"},
    {"io", "progress", "plots", "rng", "devices"},
    {"tasks"},
    {"threat"},
    {"margins"},
    {"plan", "tradeoff"},
    {"strategies"},
    {"perceptron"},
    {"losses"},
    {"data", "models"},
    {"attacks"},
    {"checkpoints"},
    {"scoring", "training", "evaluation", "generation", "report"},
    {"study", "export", "verify"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
NO_TORCH = {room for rooms in LAYERS[:8] for room in rooms} - {"devices", "tasks"}  # these import it when used
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    assert room(path) in RANK, f"{room(path)} has no place in the house: add it to LAYERS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "torch" and room(path) in NO_TORCH:
            pytest.fail(f"{path.name} imports torch: {room(path)} has to work without it")
        if parts[0] != "puma" or len(parts) < 2 or parts[1] not in RANK:
            continue
        assert parts[1] == room(path) or RANK[parts[1]] < RANK[room(path)], (
            f"{path.name} imports {name}, which is not below it"
        )


def test_the_layers_hold_no_room_that_is_gone() -> None:
    assert {room(path) for path in MODULES} == set(RANK)
