"""The results table of a study, read as cells (one trained model) and arms (the same cell under several seeds)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puma.errors import DataError, unknown

UNIFORM_EPS = "uniform-eps"
TRADES_WEIGHT = "trades-weight"
BASELINE = "none"
CONTROLS = (UNIFORM_EPS, TRADES_WEIGHT)
ROBUST = ("robust_accuracy", "apgd_accuracy")
_REQUIRED = ("strategy", "seed", "clean_accuracy")

Results = Mapping[str, Any] | Iterable[Mapping[str, Any]]
"""A table: columns by name, a pyarrow table, a pandas frame, or rows as mappings."""


@dataclass(frozen=True, order=True)
class Setting:
    """What is held fixed in a comparison."""

    study: str
    pool: str
    recipe: str
    checkpoint: str


@dataclass(frozen=True, order=True)
class Arm:
    """A strategy with its parameters and prune fraction, whatever the seed; ``params`` is JSON with sorted keys."""

    strategy: str
    params: str = "{}"
    prune_fraction: float = 0.0

    @property
    def label(self) -> str:
        """A short name for tables and pictures.

        >>> Arm("puma", '{"c": 0.5}', 0.3).label
        'puma c=0.5 30%'
        """
        params = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.items]
        share = [f"{100 * self.prune_fraction:.4g}%"] if self.prune_fraction else []
        return " ".join([self.strategy, *params, *share])

    @property
    def items(self) -> list[tuple[str, Any]]:
        """Names and values of the parameters."""
        return sorted(json.loads(self.params).items())

    @property
    def control(self) -> bool:
        """Whether the arm is itself a point of a control frontier."""
        return self.strategy in (*CONTROLS, BASELINE)


@dataclass(frozen=True)
class Cell:
    """One trained model's row: accuracies are fractions; what the table does not say is NaN."""

    setting: Setting
    arm: Arm
    seed: int
    clean: float
    robust: float
    n_test: float = math.nan
    kept: float = math.nan
    mean_eps: float = math.nan
    attack_cost: float = math.nan
    steps: float = math.nan

    @property
    def key(self) -> CellKey:
        """What names the cell, for per-image flags."""
        return self.setting, self.arm, self.seed


CellKey = tuple[Setting, Arm, int]


def read_cells(results: Results, robust: str = "robust_accuracy") -> list[Cell]:
    """The cells of a results table (DESIGN's columns; of those, ``strategy, seed, clean_accuracy`` are required).

    Args:
        results: the table; a column that is absent counts as null.
        robust: which column holds the robust accuracy, ``robust_accuracy`` or ``apgd_accuracy``.

    Raises:
        UsageError: ``robust`` is another column.
        DataError: a required column is missing, an accuracy is outside [0, 1], or a cell appears twice.
    """
    if robust not in ROBUST:
        raise unknown("robust accuracy", robust, ROBUST)
    cells: dict[CellKey, Cell] = {}
    for row in rows_of(results):
        for column in _REQUIRED:
            if row.get(column) is None:
                raise DataError(f"the results lack {column!r}", fix="give a table with the columns of results.parquet")
        cell = _cell(row, robust)
        for name, value in (("clean_accuracy", cell.clean), (robust, cell.robust)):
            if not (math.isnan(value) or 0 <= value <= 1):
                raise DataError(f"{name} {value!r} of {cell.arm.label} is not in [0, 1]")
        if cell.key in cells:
            raise DataError(
                f"the results hold {cell.arm.label}, seed {cell.seed}, twice", fix="give each study by itself"
            )
        cells[cell.key] = cell
    return list(cells.values())


def rows_of(results: Results) -> list[Mapping[str, Any]]:
    """The rows of a table in any of the forms of `Results`."""
    if hasattr(results, "to_pylist"):
        return list(results.to_pylist())
    if hasattr(results, "to_dict") and hasattr(results, "columns"):
        return list(results.to_dict("records"))
    if isinstance(results, Mapping):
        return [dict(zip(results, row, strict=True)) for row in zip(*results.values(), strict=True)]
    return list(results)


def by_setting(cells: Iterable[Cell]) -> dict[Setting, list[Cell]]:
    """Cells that may be compared with each other, in the order of the table."""
    groups: dict[Setting, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.setting, []).append(cell)
    return groups


def by_arm(cells: Iterable[Cell]) -> dict[Arm, dict[int, Cell]]:
    """The cells of one setting by arm, then by seed."""
    arms: dict[Arm, dict[int, Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, {})[cell.seed] = cell
    return arms


def _cell(row: Mapping[str, Any], robust: str) -> Cell:
    params = row.get("params") or "{}"
    parsed = dict(params) if isinstance(params, Mapping) else json.loads(str(params))
    arm = Arm(str(row["strategy"]), json.dumps(parsed, sort_keys=True), _number(row.get("prune_fraction"), 0.0))
    study, pool, recipe = (str(row.get(name) or "") for name in ("study", "pool", "recipe"))
    setting = Setting(study, pool, recipe, str(row.get("checkpoint") or "last"))
    facts = {name: _number(row.get(name)) for name in ("n_test", "kept", "mean_eps", "attack_cost", "steps")}
    return Cell(setting, arm, int(row["seed"]), _number(row["clean_accuracy"]), _number(row.get(robust)), **facts)


def _number(value: Any, missing: float = math.nan) -> float:
    return missing if value is None else float(value)
