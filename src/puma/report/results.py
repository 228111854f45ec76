"""The results of a study as the report reads them: ``results.parquet``, row by row and arm by arm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from puma.tradeoff import Group, RunKey, Setting, tables

COLUMNS = tuple(tables.RESULTS.names)


@dataclass(frozen=True)
class Result:
    """One row of ``results.parquet``: one checkpoint of one run, judged.

    Accuracies are shares in [0, 1]; ``robust_accuracy`` is AutoAttack standard or None; ``eps_train`` and ``mean_eps``
    are pixel units; ``attack_cost`` is in forward-equivalents or None.
    """

    study: str
    pool: str
    strategy: str
    params: str
    prune_fraction: float
    seed: int
    recipe: str
    checkpoint: str
    eps_train: float
    clean_accuracy: float
    robust_accuracy: float | None
    apgd_accuracy: float | None
    n_test: int
    kept: int
    mean_eps: float
    attack_cost: float | None
    steps: int

    @property
    def key(self) -> RunKey:
        """The row as `puma.tradeoff` names it."""
        group = Group(self.study, self.pool, self.recipe, self.checkpoint)
        return group, Setting(self.strategy, self.params, self.prune_fraction), self.seed

    def to_dict(self) -> dict[str, Any]:
        """The row as a mapping of the columns."""
        return {name: getattr(self, name) for name in COLUMNS}

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The strategy's parameters."""
        return dict(json.loads(self.params or "{}"))


@dataclass(frozen=True)
class Arm:
    """One way to choose data, over its seeds: everything that a row names except seed and checkpoint.

    ``label`` names it within its study: the strategy, those parameters in which arms of it differ, and the prune
    fraction where the study has several.
    """

    label: str
    rows: tuple[Result, ...]

    @property
    def first(self) -> Result:
        """The row of the lowest seed."""
        return self.rows[0]

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return self.first.strategy

    @property
    def seeds(self) -> tuple[int, ...]:
        """Its seeds, ascending."""
        return tuple(row.seed for row in self.rows)

    def mean(self, column: str) -> float | None:
        """Mean of a column over the seeds; None if one is missing."""
        values = [getattr(row, column) for row in self.rows]
        return None if any(value is None for value in values) else sum(values) / len(values)


def read_results(path: Path | str) -> list[Result]:
    """Read ``results.parquet``.

    Raises:
        DataError: missing, no Parquet, columns missing, nulls where none belong, accuracies outside [0, 1].
    """
    return [Result(**row) for row in tables.read_results(path)]


def arms(rows: Iterable[Result], checkpoint: str = "last") -> list[Arm]:
    """The arms of a study at one checkpoint, in the order of the table, their rows by ascending seed."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for row in rows:
        if row.checkpoint == checkpoint:
            groups.setdefault(_arm_key(row), []).append(row)
    firsts = [group[0] for group in groups.values()]
    return [Arm(_label(group[0], firsts), tuple(sorted(group, key=lambda row: row.seed))) for group in groups.values()]


def _arm_key(row: Result) -> tuple[Any, ...]:
    return row.pool, row.recipe, row.strategy, row.params, row.prune_fraction


def _label(row: Result, firsts: list[Result]) -> str:
    kin = [other for other in firsts if other.strategy == row.strategy]
    names = [
        name
        for name in sorted({name for other in kin for name in other.parameters})
        if len({json.dumps(other.parameters.get(name)) for other in kin}) > 1
    ]
    parts = [f"{name}={_short(row.parameters.get(name))}" for name in names]
    if len({other.prune_fraction for other in kin}) > 1:
        parts.append(f"p={row.prune_fraction:g}")
    return f"{row.strategy} {' '.join(parts)}".strip()


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
